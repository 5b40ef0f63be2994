"""Check that a model fits into the available memory."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

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
    left = available_bytes(device)
    needed = (count_parameters(folder) or 0) * FLOAT32 * OVERHEAD
    if left is not None and needed > left:
        raise ModelNotLoaded(
            name,
            f"it needs {_gib(needed)} of memory in float32, {_gib(left)} are available on {device}",
            "end other programs, choose another `device`, or take a smaller model",
        )


def count_parameters(folder: Path) -> int | None:
    """Count a model's parameters from its safetensors headers; None if it has no such files."""
    files = list(folder.glob("*.safetensors"))
    try:
        return sum(map(_file_parameters, files)) if files else None
    except (OSError, SafetensorError):
        return None  # a damaged file is named when it is loaded


def _file_parameters(path: Path) -> int:
    with safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def available_bytes(device: torch.device) -> int | None:
    """Return the available memory of a device in bytes; None if unknown."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if find_spec("psutil"):
        import psutil

        return int(psutil.virtual_memory().available)
    table = Path("/proc/meminfo")
    lines = table.read_text(encoding="ascii").splitlines() if table.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
