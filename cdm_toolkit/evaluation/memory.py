"""Check that a model fits into the available memory."""

from __future__ import annotations

import json
import math
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_toolkit.errors import ModelNotLoaded

if TYPE_CHECKING:
    import torch

FLOAT32 = 4
OVERHEAD = 1.1
"""Factor on the size of the weights, for loading and a small batch."""


def check_fits(name: str, folder: Path, device: torch.device) -> None:
    """Raise ModelNotLoaded where a model in float32 needs more memory than a device has available.

    Does nothing where either is unknown.
    """
    parameters = count_parameters(folder)
    left = available_bytes(device)
    if parameters is None or left is None:
        return
    needed = parameters * FLOAT32 * OVERHEAD
    if needed > left:
        raise ModelNotLoaded(
            name,
            f"it needs {_gib(needed)} of memory in float32, {_gib(left)} are available on {device}",
            "end other programs, choose another `device`, or take a smaller model",
        )


def count_parameters(folder: Path) -> int | None:
    """Count a model's parameters from its safetensors headers; None if it has no such files."""
    files = sorted(folder.glob("*.safetensors"))
    try:
        return sum(map(_file_parameters, files)) if files else None
    except (OSError, ValueError, KeyError, struct.error):
        return None  # a damaged file is named when it is loaded


def _file_parameters(path: Path) -> int:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(size, path.stat().st_size)))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def available_bytes(device: torch.device) -> int | None:
    """Return the available memory of a device in bytes; None if unknown."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if find_spec("psutil"):
        import psutil

        return int(psutil.virtual_memory().available)
    return _from_proc(Path("/proc/meminfo"))


def _from_proc(path: Path) -> int | None:
    if not path.is_file():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
