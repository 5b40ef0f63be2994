"""The bytes that tensors hold, as operators make them and nobody needs them any more."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 1 << 25
"""Bytes from which on it is looked up who made a tensor."""
PACKAGE = "cdm_toolkit/"


@dataclass(frozen=True, slots=True)
class Held:
    """A storage, by the first tensor on it, and the line of the package that it was made under."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operator: str
    made_in: str

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


class LiveBytes(TorchDispatchMode):
    """Count the storages on a device, or on all of its type, that are alive, each once, whoever looks at it.

    It sees what operators give back, also in the backward pass; not what a kernel takes for itself while it
    runs. Storages of FakeTensorMode have sizes as real ones do.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.alive: dict[int, Held] = {}
        self.now = 0
        self.start()

    def start(self) -> None:
        """Look for the peak from here on."""
        self.at_start = self.peak = self.now
        self.at_peak = list(self.alive.values())
        self.made: list[Held] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and self.device in (leaf.device.type, str(leaf.device)):
                self._hold(leaf, func)
        return result

    def _hold(self, tensor: torch.Tensor, func: Callable[..., Any]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        held = Held(
            size,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            str(func),
            _line() if size >= LARGE else "",
        )
        self.alive[key] = held
        weakref.finalize(storage, self._drop, key)
        self.now += size
        if size >= LARGE:
            self.made.append(held)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, list(self.alive.values())

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key).bytes


def _line() -> str:
    """Name the innermost line of the package that runs; empty where none does."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name:
            return f"{name.rpartition(PACKAGE)[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
