"""Train tiny models for a few steps on each device, dtype and kernel of this machine, against the CPU in float32."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_toolkit.artifacts.provenance import installed_version
from cdm_toolkit.errors import CdmError, Interrupted, NotFinite

if TYPE_CHECKING:
    from cdm_toolkit.distill.logs import StepLog
    from cdm_toolkit.distill.prepare import Progress
    from cdm_toolkit.distill.settings import DistillConfig
    from cdm_toolkit.hub.tiny_models import TinyPair

STEPS, ROWS_PER_STEP = 3, 4
DATA = "sample:train"
TEXTS = 60
"""Rows of the sample that the tokenizers are trained on."""
TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest relative difference, by dtype, from the losses of the CPU in float32."""
KERNELS: Mapping[str, Mapping[str, Any]] = {
    "sdpa": {"attn_implementation": "sdpa"},
    "eager": {"attn_implementation": "eager"},
    "flash_attention_2": {"attn_implementation": "flash_attention_2"},
    "torch.compile": {"compile": True},
    "liger": {"trainer": {"use_liger_kernel": True}},
}
"""What a run can compute with, and the settings in `train` that ask for it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a run of a few steps gave on a device, in a dtype, with a kernel; `problem` says why it gave nothing.

    `difference` is the largest relative difference of a step's loss, CE and KD from those of the reference, the CPU in
    float32; None where one of the two has no losses. `tokens_per_second` leaves out the first step. `memory` in bytes:
    on CUDA the peak that torch allocated, on Metal what the driver holds, on the CPU what the resident set grew by.
    """

    device: str
    dtype: str
    kernel: str = "sdpa"
    losses: tuple[StepLog, ...] = ()
    tokens_per_second: float | None = None
    memory: int | None = None
    difference: float | None = None
    problem: str | None = None

    @property
    def agrees(self) -> bool:
        return self.difference is not None and self.difference <= TOLERANCE[self.dtype]


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """The trials, of which the first is the reference; kernels that were not tried, and why; what is wrong with DTW."""

    trials: tuple[Trial, ...]
    untried: Mapping[str, str]
    dtw_problem: str | None
    seconds: float

    @property
    def well(self) -> bool:
        return self.dtw_problem is None and all(trial.agrees for trial in self.trials)


def check_devices(
    devices: Sequence[str] | None = None, *, on_progress: Callable[[int, int], None] = lambda *_: None
) -> DeviceReport:
    """Run `distill.run` on each device with fresh tiny models, method `spelling` and a sample of the package.

    `devices` are cpu, cuda:0, …, mps; by default all that torch sees. What fails there is a line of the report. Trials
    on other devices than the CPU have a process of their own, which sees that device alone. Raises BadOption for a
    device that is not here.
    """
    from cdm_toolkit.distill.sources import read_rows
    from cdm_toolkit.hub.tiny_models import new_tiny_pair

    began = time.perf_counter()
    chosen = _devices_here() if devices is None else [_checked(name) for name in devices]
    trials = [Trial("cpu", "float32"), *(trial for name in dict.fromkeys(chosen) for trial in _trials(name))]
    trials = list(dict.fromkeys(trials))
    done: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="cdm-", ignore_cleanup_errors=True) as folder:
        pair = new_tiny_pair([row.text for row in read_rows(DATA)[:TEXTS]], Path(folder))
        on_progress(0, len(trials))
        for trial in trials:
            ran = (run_trial if trial.device == "cpu" else _run_alone)(trial, pair, folder)
            done.append(_compared(ran, done[0] if done else ran))
            on_progress(len(done), len(trials))
    return DeviceReport(tuple(done), _untried(chosen), _dtw_problem(), time.perf_counter() - began)


def _devices_here() -> list[str]:
    import torch

    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def _checked(name: str) -> str:
    from cdm_toolkit.hub.models import checked_device

    device = checked_device(name)
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type


def _trials(device: str) -> Iterator[Trial]:
    """List what to try on a device: both dtypes, and the kernels that are there for it."""
    yield from (Trial(device, dtype) for dtype in TOLERANCE)
    missing = _untried([device])
    dtype = "bfloat16" if device.startswith("cuda") else "float32"  # as runs there are
    yield from (
        Trial(device, dtype, kernel) for kernel in KERNELS if kernel != "sdpa" and kernel not in missing
    )


def _untried(devices: Sequence[str]) -> dict[str, str]:
    """Name the kernels that none of some devices can be asked for, and why."""
    for_cuda = {
        "flash_attention_2": installed_version("flash-attn") is not None,
        "torch.compile": installed_version("triton") is not None and _compiler() is not None,
        "liger": installed_version("liger-kernel") is not None,
    }
    if any(device.startswith("cuda") for device in devices):
        whys = {name: "not installed" for name, here in for_cuda.items() if not here}
        if "torch.compile" in whys:
            whys["torch.compile"] = "needs triton and a C compiler, such as gcc"
        return whys
    whys = dict.fromkeys(for_cuda, "needs CUDA")
    compiler = _compiler()
    whys["torch.compile"] = f"takes a minute on a CPU, with {compiler}" if compiler else "no C compiler"
    return whys


def _compiler() -> str | None:
    return next(
        (name for name in (os.environ.get("CC"), "gcc", "clang") if name and shutil.which(name)), None
    )


def _run_alone(trial: Trial, pair: TinyPair, folder: str) -> Trial:
    """Run a trial in a process that sees its device alone, and whose crash or broken GPU touches no other."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_set_environment, initargs=(_visible(trial.device),)
    ) as pool:
        try:
            return pool.submit(run_trial, trial, pair, folder).result()
        except BrokenProcessPool:
            return replace(trial, problem="its process crashed or was killed")


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


def _visible(device: str) -> dict[str, str]:
    """Give the variables that show a CUDA device alone to a new process, also where few are shown to this one."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return {}
    name = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"
    shown = os.environ.get(name)
    return {name: shown.split(",")[int(index)] if shown else index}


def run_trial(trial: Trial, pair: TinyPair, folder: str) -> Trial:
    """Train the student of a pair for a few steps as a trial says; `folder` takes what is written."""
    from cdm_toolkit.distill.run import run

    kind = trial.device.partition(":")[0]
    stamps: dict[tuple[str, int], float] = {}

    def note(progress: Progress) -> None:
        stamps[progress.stage, progress.done] = time.perf_counter()

    try:
        gc.collect()
        before = _memory(kind)
        with tempfile.TemporaryDirectory(dir=folder) as output:
            losses = run(_config(trial, kind, pair, output), overwrite=True, on_progress=note).losses
        held = _memory(kind)
    except Interrupted as error:  # with advice to go on, which a trial cannot
        raise KeyboardInterrupt from error
    except Exception as error:  # whatever a device, a driver or a kernel does not do
        return replace(trial, problem=_in_one_line(error))
    seconds = stamps["save", 0] - stamps["train", 1]
    return replace(
        trial,
        losses=losses,
        tokens_per_second=sum(log.tokens for log in losses[1:]) / seconds,
        memory=None if held is None or before is None else held - before,
    )


def _config(trial: Trial, kind: str, pair: TinyPair, output: str) -> DistillConfig:
    from cdm_toolkit.distill.settings import from_mapping

    train = {
        "device": kind,
        "dtype": trial.dtype,
        "max_steps": STEPS,
        "batch_size": ROWS_PER_STEP,
        "lr": 3e-3,
        "log_every": 1,
        "save_every": 0,
    }
    return from_mapping(
        {
            "student": pair.student,
            "data": {"path": DATA, "limit": STEPS * ROWS_PER_STEP},
            "output": output,
            "alpha": 0.5,
            "teachers": [{"model": pair.teacher, "method": "spelling", "dtype": trial.dtype}],
            "train": train | dict(KERNELS[trial.kernel]),
        }
    )


def _memory(kind: str) -> int | None:
    """Measure the bytes in use: on CUDA the peak so far, on Metal the driver's, on the CPU the resident set.

    None where the CPU's cannot be known.
    """
    import torch

    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    if kind == "mps":
        return torch.mps.driver_allocated_memory()
    table = Path("/proc/self/statm")
    return int(table.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if table.exists() else None


def _in_one_line(error: Exception) -> str:
    if isinstance(error, CdmError):
        return error.what if isinstance(error, NotFinite) else str(error)
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:200]


def _compared(trial: Trial, reference: Trial) -> Trial:
    """Note the largest relative difference of a trial's losses from those of the reference."""
    if not trial.losses or not reference.losses:
        return trial
    pairs = zip(_figures(trial), _figures(reference), strict=True)
    return replace(trial, difference=max(abs(a - b) / abs(b) for a, b in pairs))


def _figures(trial: Trial) -> list[float]:
    figures = (figure for log in trial.losses for figure in (log.loss, log.ce, log.teachers[0].kd))
    return [figure for figure in figures if figure is not None]


def _dtw_problem() -> str | None:
    """Warp two sequences of tokens with the compiled loops, and say where they do not give what the reference gives."""
    import numpy as np

    from cdm_toolkit.alignment import dtw_reference

    t, s = [b"ab", b"c", b"de", b"f"], [b"a", b"bc", b"d", b"ef"]
    weights, index = np.full(4, 3, np.int64), np.arange(4)
    try:
        from cdm_toolkit.alignment.dtw import token_distances, warp

        path, cost = warp(token_distances(t, s), index, index, weights, weights)
    except Exception as error:  # as numba has it
        return _in_one_line(error)
    found = [tuple(link) for link in path.tolist()], cost
    expected = dtw_reference.warp(t, s, weights.tolist(), weights.tolist())
    return None if found == expected else f"gives {found}, the reference {expected}"
