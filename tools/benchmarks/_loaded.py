"""Load a model in processes of their own: a program that takes a list of options of `load_model` as JSON; prints JSON.

On a device that is not here, tensors of FakeTensorMode take the place of those that would lie there; what the process
itself takes on the way, such as the file's pages and what is read of it, is real. That needs what `_traced.py` needs.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__" and sys.argv[2]:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads know of no FakeTensorMode

import torch
import transformers.core_model_loading as core
import transformers.modeling_utils as modeling
import transformers.models.llama.modeling_llama  # noqa: F401  # what it takes is not of a load
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from benchmarks._live import LiveBytes
from cdm_toolkit.hub import models

STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Bytes: of the weights; of the process until it has loaded and read them all, above what it had before."""

    weights: int
    largest: int
    """Of the tensors that are read, in the dtype that they are cast to."""
    peak: int
    """With pages of the file, which the kernel can drop."""
    peak_allocated: int
    """Without these."""
    on_device: int
    """At the peak, on a device that is not here."""


def measured(options: dict[str, Any]) -> Loaded:
    """Load a model."""
    device = options.get("device", "cpu")
    before, allocated = _bytes("VmRSS"), _bytes("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    with _highest("RssAnon") as highest:
        model, on_device = (models.load_model(**options), 0) if device == "cpu" else _faked(device, options)
    tensors = {tensor.untyped_storage()._cdata: tensor for tensor in [*model.parameters(), *model.buffers()]}
    weights = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    if device == "cpu":  # pages of a file are read when they are looked at
        for tensor in tensors.values():
            tensor.sum()
    largest = max(tensor.nbytes for tensor in tensors.values())
    return Loaded(weights, largest, _bytes("VmHWM") - before, highest[0] - allocated, on_device)


def _faked(device: str, options: dict[str, Any]) -> tuple[Any, int]:
    """Load a model to a device that is not here; gives the bytes that lie there at the peak as well."""
    with (
        patch.object(models, "checked_device", lambda name, **_: torch.device(name)),
        patch.object(core, "_materialize_copy", _read_and_fake),
        patch.object(modeling, "caching_allocator_warmup", lambda *_: None),
        FakeTensorMode(),
        LiveBytes(device) as live,
    ):
        return models.load_model(**options), live.peak


def _read_and_fake(tensor: Any, device: Any = None, dtype: Any = None) -> Tensor:
    """Read a tensor of the file and cast it, as transformers does, and put one without data on the device."""
    with unset_fake_temporarily():
        real: Tensor = tensor[...].to(dtype=dtype, copy=True)
    return torch.empty(real.shape, dtype=real.dtype, device=device)


def _bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


@contextmanager
def _highest(name: str) -> Iterator[list[int]]:
    """Look at a figure of the process each millisecond; the highest is in the list."""
    highest, done = [_bytes(name)], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], _bytes(name))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield highest
    finally:
        highest[0] = max(highest[0], _bytes(name))
        done.set()
        thread.join()


def alone(given: dict[str, Any]) -> dict[str, int]:
    """Load a model in a process that is forked from this one, which has loaded torch and transformers. OSError."""
    out, into = os.pipe()
    if (child := os.fork()) == 0:
        os.close(out)
        if given.get("quantization"):
            import bitsandbytes  # noqa: F401
        with os.fdopen(into, "w") as answer:
            json.dump(asdict(measured(given)), answer)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as answer:
        said = answer.read()
    if os.waitpid(child, 0)[1]:
        raise OSError(f"{given} cannot be loaded")
    found: dict[str, int] = json.loads(said)
    return found


if __name__ == "__main__":
    json.dump([alone(given) for given in json.loads(sys.argv[1])], sys.stdout)
