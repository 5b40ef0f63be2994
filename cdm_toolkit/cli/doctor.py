"""`cdm doctor`: report versions, hardware and caches of this machine, and whether training works on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdm_toolkit import __version__
from cdm_toolkit.artifacts.provenance import installed_version
from cdm_toolkit.cli import options, screen
from cdm_toolkit.cli.translate_messages import in_terminal
from cdm_toolkit.errors import CdmError

if TYPE_CHECKING:
    from cdm_toolkit.distill.device_check import DeviceReport, Trial

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
    "bitsandbytes": "quantization",
    "pyarrow": "export",
    "lm-eval": "eval",
    "datasets": "eval",
}


def doctor(
    train: Annotated[
        bool,
        typer.Option(
            "--train",
            help="Train tiny models for three steps on each device, dtype and kernel, and compare with the CPU.",
        ),
    ] = False,
    devices: Annotated[
        str | None, typer.Option(help="With --train: cpu, cuda:0, …, mps, with commas; all that are here.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Report package versions, torch build, CUDA, memory, cache folder and locally available aliases.

    With --train: a report on training, in Markdown, to paste into a bug report. Exit status 1: something is wrong.
    """
    if train:
        _check_training(devices, as_json)
        return
    if devices is not None:
        raise CdmError("`devices` is for training", fix="give `train` as well, or leave it out")
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
        "CPU": f"{report['cpu']}, {report['cores']} cores",
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


def _check_training(devices: str | None, as_json: bool) -> None:
    from cdm_toolkit.distill.device_check import check_devices

    with screen.counted("training on each device") as tell:
        report = check_devices(devices and devices.split(","), on_progress=tell)
    facts = _machine()
    if as_json:
        screen.print_json({**facts, **asdict(report), "well": report.well})
    else:
        screen.line("\n".join(_as_markdown(facts, report)))
    if not report.well:
        raise typer.Exit(1)


def _as_markdown(facts: dict[str, Any], report: DeviceReport) -> Iterator[str]:
    """Write a report on training line by line; without names of folders, because it is made to be shown."""
    from cdm_toolkit.distill.device_check import STEPS

    memory = facts["memory_gib"]
    packages = [f"{name} {found}" for name, found in facts["packages"].items() if found]
    yield f"### cdm doctor --train, cdm-toolkit {facts['cdm_toolkit']}"
    yield ""
    yield f"- Python {facts['python']} on {facts['platform']}"
    yield f"- {', '.join(packages)}"
    yield f"- CPU: {facts['cpu']}, {facts['cores']} cores" + (
        f", {memory['total']:.1f} GiB" if memory else ""
    )
    yield f"- torch build: {facts['torch_build']}; CUDA: {facts['cuda']}; driver: {facts['driver'] or 'none'}"
    yield ""
    yield from _markdown_table(
        ("device", "dtype", "kernel", f"loss of {STEPS} steps", "tokens/s", "memory", "against cpu float32"),
        [_trial_cells(trial, is_reference=nth == 0) for nth, trial in enumerate(report.trials)],
    )
    yield ""
    yield "memory: on CUDA the peak of tensors; on the CPU what the process grew by, with libraries in the first row"
    if report.untried:
        yield f"not tried: {'; '.join(f'{name} ({why})' for name, why in report.untried.items())}"
    yield f"DTW by numba: {report.dtw_problem or 'as the reference'}"
    bad = sum(not trial.agrees for trial in report.trials)
    verdict = f"{bad} of {len(report.trials)} trials failed or differ" if bad else "all trials agree"
    yield f"{verdict}; {report.seconds:.0f} s"


def _trial_cells(trial: Trial, *, is_reference: bool) -> tuple[str, ...]:
    from cdm_toolkit.distill.device_check import TOLERANCE

    if trial.problem is not None:
        verdict = f"failed: {in_terminal(trial.problem)}"
    elif trial.difference is None:
        verdict = "nothing to compare with"
    elif is_reference:
        verdict = "the reference"
    elif trial.agrees:
        verdict = f"agrees ({trial.difference:.0e})"
    else:
        verdict = f"differs by {trial.difference:.0e}, more than {TOLERANCE[trial.dtype]:.0e}"
    return (
        trial.device,
        trial.dtype,
        trial.kernel,
        " ".join(f"{log.loss:.4f}" for log in trial.losses) or "-",
        "-" if trial.tokens_per_second is None else f"{trial.tokens_per_second:,.0f}",
        "-" if trial.memory is None else f"{trial.memory / 2**20:,.0f} MiB",
        verdict,
    )


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Write a table that is aligned as plain text too; a bar in a cell would end it."""
    cells = [[cell.replace("|", "/") for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    for row in (padded[0], ["-" * width for width in widths], *padded[1:]):
        yield f"| {' | '.join(row)} |"


def examine() -> dict[str, Any]:
    """Collect the report for JSON."""
    from cdm_toolkit.artifacts.cache import cache_folder
    from cdm_toolkit.hub.resolve import list_aliases

    folder = cache_folder()
    here = folder if folder.exists() else next(parent for parent in folder.parents if parent.exists())
    return {
        **_machine(),
        "cache": {
            "folder": str(folder),
            "state": "writable" if os.access(here, os.W_OK) else "not writable",
            "disk_free_gib": shutil.disk_usage(here).free / 2**30,
        },
        "aliases_at_hand": [status.alias for status in list_aliases() if status.here],
    }


def _machine() -> dict[str, Any]:
    return {
        "cdm_toolkit": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed_version(name) for name in _PACKAGES},
        **_torch_facts(),
        "memory_gib": _memory(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _torch_facts() -> dict[str, str | None]:
    import torch

    built_for = torch.version.cuda
    build = f"CUDA {built_for}" if built_for else "CPU only"
    if torch.cuda.is_available():
        try:
            cuda = f"yes: {', '.join(_gpu(index) for index in range(torch.cuda.device_count()))}"
        except RuntimeError as error:
            cuda = f"no: torch sees a device that does not answer: {str(error).splitlines()[0]}"
    elif built_for is None:
        cuda = "no: this torch is a CPU build"
    elif not Path("/dev/nvidiactl").exists():
        cuda = "no: torch can, but no NVIDIA driver is loaded"
    else:
        cuda = "no: torch and a driver are here, but no device answers; nvidia-smi may say why"
    driver = Path("/sys/module/nvidia/version")
    return {
        "torch_build": build,
        "cuda": cuda,
        "driver": driver.read_text().strip() if driver.exists() else None,
    }


def _gpu(index: int) -> str:
    import torch

    found = torch.cuda.get_device_properties(index)
    return f"{found.name} ({found.total_memory / 2**30:.1f} GiB, capability {found.major}.{found.minor})"


def _cpu_name() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _memory() -> dict[str, float] | None:
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    facts = dict(line.split(":", 1) for line in table.read_text().splitlines())
    gib = {key: int(facts[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable")}
    return {"total": gib["MemTotal"], "available": gib["MemAvailable"]}
