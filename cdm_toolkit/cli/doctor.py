"""`cdm doctor`: report versions, hardware and caches of this machine."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from cdm_toolkit import __version__
from cdm_toolkit.artifacts.provenance import installed_version
from cdm_toolkit.cli import options, screen

# Packages with the extra that installs them; None for those that every command needs.
_PACKAGES = {
    "torch": None,
    "transformers": None,
    "tokenizers": None,
    "numba": None,
    "rapidfuzz": None,
    "safetensors": None,
    "accelerate": "train",
    "gguf": "convert",
    "sentencepiece": "convert",
    "tiktoken": "convert",
    "pyarrow": "export",
    "lm-eval": "eval",
    "datasets": "eval",
}


def doctor(as_json: options.AsJson = False) -> None:
    """Report package versions, torch build, CUDA, memory, cache folder and locally available aliases."""
    report = examine()
    if as_json:
        screen.print_json(report)
        return
    memory, cache = report["memory_gib"], report["cache"]
    free = f"{memory['available']:.1f} of {memory['total']:.1f} GiB free" if memory else "unknown"
    facts = {
        "cdm-toolkit": report["cdm_toolkit"],
        "Python": f"{report['python']} on {report['platform']}",
        "torch build": report["torch_build"],
        "CUDA": report["cuda"],
        "memory": free,
        "cores": f"{report['cores']}",
        "cache folder": f"{cache['folder']} ({cache['state']}, {cache['disk_free_gib']:.1f} GiB free)",
        "aliases at hand": ", ".join(report["aliases_at_hand"]) or "none yet: cdm models fetch smollm2",
    }
    screen.print_table(None, ("what", "found"), facts.items())
    packages = (_package_row(name, found) for name, found in report["packages"].items())
    screen.print_table(None, ("package", "version", "needed by"), packages)


def _package_row(name: str, found: str | None) -> tuple[str, str, str]:
    if (extra := _PACKAGES[name]) is None:
        return name, found or "missing", "every command"
    return name, found or f'missing: pip install "cdm-toolkit[{extra}]"', f"the extra {extra}"


def examine() -> dict[str, Any]:
    """Collect the report for JSON."""
    from cdm_toolkit.artifacts.cache import cache_folder
    from cdm_toolkit.hub.resolve import list_aliases

    folder = cache_folder()
    here = folder if folder.exists() else next(parent for parent in folder.parents if parent.exists())
    return {
        "cdm_toolkit": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed_version(name) for name in _PACKAGES},
        **_torch_facts(),
        "memory_gib": _memory(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cache": {
            "folder": str(folder),
            "state": "writable" if os.access(here, os.W_OK) else "not writable",
            "disk_free_gib": shutil.disk_usage(here).free / 2**30,
        },
        "aliases_at_hand": [status.alias for status in list_aliases() if status.here],
    }


def _torch_facts() -> dict[str, str]:
    import torch

    built_for = torch.version.cuda
    build = f"CUDA {built_for}" if built_for else "CPU only"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = f"yes: {', '.join(names)}"
    elif built_for is None:
        cuda = "no: this torch is a CPU build"
    elif not Path("/dev/nvidiactl").exists():
        cuda = "no: torch can, but no NVIDIA driver is loaded"
    else:
        cuda = "no: torch and a driver are here, but no device answers; nvidia-smi may say why"
    return {"torch_build": build, "cuda": cuda}


def _memory() -> dict[str, float] | None:
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    facts = dict(line.split(":", 1) for line in table.read_text().splitlines())
    gib = {key: int(facts[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable")}
    return {"total": gib["MemTotal"], "available": gib["MemAvailable"]}
