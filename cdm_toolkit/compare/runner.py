"""Run the cells of a study: one in this process, or all missing ones, each in a process of its own."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cdm_toolkit.artifacts.code_fingerprint import PACKAGE, code_fingerprint
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.compare.prepared import (
    CODE,
    OnStage,
    Shared,
    check_origin,
    prepare,
    run_settings,
    score,
)
from cdm_toolkit.compare.study import StudyConfig, cell_at, grid
from cdm_toolkit.compare.study_folder import LOG_FILE, Say, Stored, StudyFolder, is_held, only_one
from cdm_toolkit.compare.types import Cell, CellResult, Point
from cdm_toolkit.distill.logs import StepLog
from cdm_toolkit.distill.output_folder import TRAINED_BY
from cdm_toolkit.distill.settings import DistillConfig, from_mapping
from cdm_toolkit.errors import Interrupted
from cdm_toolkit.kd.method import find_method

PROGRESS_FILE, MODEL_FOLDER, SCRATCH = "progress.json", "model", ".scratch"
LINES_OF_LOG = 20
"""How many lines a cell logs, where the study does not say how often."""
_BEGUN = ("start", 0, 1)
"""Progress of a cell that has not reported any yet."""
POLL = 0.2
"""Seconds between two looks at the processes."""


# One cell


def run_cell(
    study: StudyConfig,
    folder: StudyFolder,
    which: int | str,
    *,
    overwrite: bool = False,
    keep_models: bool = False,
    go_on: str = "the same command",
    say: Say = lambda _: None,
    on_stage: OnStage = lambda _stage, _done, _total: None,
) -> CellResult:
    """Train and measure one cell in this process, or read its result; `overwrite` runs it again.

    Where another process runs it, this one waits for that. Raises as `prepare` and `distill.run`, and Interrupted.
    """
    cell = cell_at(study, which)
    torch.set_num_threads(study.threads)  # sums come out in another order with another number
    shared = prepare(study, folder, say=say, on_stage=on_stage)
    with only_one(folder.of(cell), f"runs cell {cell.index}", say):
        found = folder.read_cell(study, cell) if not overwrite else None
        if found is not None:
            return found.result
        check_origin(study, shared)
        scratch = folder.of(cell) / SCRATCH
        try:
            stored = _run(study, shared, cell, scratch, _Follower(folder.of(cell) / PROGRESS_FILE, on_stage))
            if keep_models:
                shutil.rmtree(folder.of(cell) / MODEL_FOLDER, ignore_errors=True)
                scratch.rename(folder.of(cell) / MODEL_FOLDER)
            folder.write_cell(stored)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(f"cell {cell.index}", "nothing of it is kept", go_on) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            (folder.of(cell) / PROGRESS_FILE).unlink(missing_ok=True)
    return stored.result


def cell_config(study: StudyConfig, shared: Shared, cell: Cell, output: Path) -> DistillConfig:
    """Write down the run of a cell."""
    steps = study.steps_of(cell.method)
    own = {"log_every": max(1, steps // LINES_OF_LOG)} | study.run.model_dump(exclude_unset=True)
    run = run_settings(study, shared.student, shared.train, output, steps, own | {"seed": cell.seed})
    entry = study.methods[cell.method]
    teacher, _ = entry.resolved()
    if teacher:
        model = {"model": shared.teacher_model or study.teacher}
        cached = {"cache": shared.cache} if entry.uses_cache else {}
        run |= {"alpha": cell.alpha, "teachers": [model | cached | teacher]}
    if entry.on_policy is not None:
        run |= {"on_policy": entry.on_policy.model_dump(exclude_unset=True)}
    return from_mapping(run, source=f"cell {cell.index}")


class _Follower:
    """Record the times of steps and report progress, also in a file for the parent process."""

    def __init__(self, file: Path, on_stage: OnStage) -> None:
        self.file, self.on_stage = file, on_stage
        self.times = [time.perf_counter()]

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "train":
            self.times.append(time.perf_counter())
        elif len(self.times) == 1:
            self.times[0] = time.perf_counter()
        self.on_stage(stage, done, total)
        self.file.write_text(json.dumps([stage, done, total]), encoding="utf-8")

    @property
    def step_seconds(self) -> float:
        """Give the median of a step; without the first, which has to warm up, where there are more."""
        times = self.times[1:] if len(self.times) > 2 else self.times
        return statistics.median(after - before for before, after in pairwise(times))


def _run(study: StudyConfig, shared: Shared, cell: Cell, scratch: Path, follower: _Follower) -> Stored:
    from cdm_toolkit.distill.run import run

    shutil.rmtree(scratch, ignore_errors=True)
    config = cell_config(study, shared, cell, scratch)
    trained = run(config, on_progress=lambda at: follower(at.stage, at.done, at.total))
    step_seconds, memory = follower.step_seconds, peak_memory(study.run.torch_device)
    scores = score(
        study,
        str(scratch),
        shared.heldout,
        shared.teacher,
        lambda done, total: follower("measure", done, total),
    )
    result = CellResult(
        cell=cell,
        scores=scores,
        steps=trained.steps,
        tokens=trained.tokens,
        step_seconds=step_seconds,
        peak_memory=memory,
        curve=tuple(_point(log) for log in trained.losses),
        settings=config.model_dump(mode="json", exclude_unset=True, exclude={"output"}),
        teacher_tokens=sum(sum(log.teacher_tokens) for log in trained.losses),
        seconds=_seconds(trained.losses),
    )
    made_of = {**shared.fingerprints, CODE: _code_of(study, cell)}
    made_by = provenance(fingerprints=made_of, seed=cell.seed, device=study.run.torch_device)
    options = study.methods[cell.method].options()
    return Stored(result, options, machine(study), trained.warnings, dict(made_by))


def _seconds(losses: Sequence[StepLog]) -> dict[str, float]:
    """Average the seconds of a step over all steps, by part."""
    seconds: Counter[str] = Counter()
    before = 0
    for log in losses:
        assert log.seconds is not None
        seconds.update({part: taken * (log.step - before) for part, taken in asdict(log.seconds).items()})
        before = log.step
    return {part: taken / before for part, taken in seconds.items()}


def _code_of(study: StudyConfig, cell: Cell) -> str:
    """Hash the sources that trained a cell, the file of a plugin's method among them."""
    own = code_fingerprint(*TRAINED_BY)
    method = study.methods[cell.method].options().get("method")
    file = inspect.getsourcefile(find_method(method)) if method else None
    if file is None or Path(file).is_relative_to(PACKAGE):
        return own
    return hashlib.sha256(own.encode() + Path(file).read_bytes()).hexdigest()


def _point(log: Any) -> Point:
    """Take from a line of the log what a figure shows."""
    if not log.teachers:
        return Point(log.step, log.ce, None, None)
    (teacher,) = log.teachers
    return Point(log.step, log.ce, teacher.kd, teacher.matched_mass if teacher.pairs else None)


def peak_memory(device: str) -> int:
    """Give the most bytes that were in use so far: of torch's allocator on CUDA, of this process elsewhere."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # the kernel's own count; that of getrusage begins with the process which started this one
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def machine(study: StudyConfig) -> str:
    """Name what a cell runs on."""
    device = torch.cuda.get_device_name() if study.run.torch_device == "cuda" else study.run.torch_device
    threads = f"{study.threads} thread{'s' if study.threads > 1 else ''} a cell"
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {threads}, {device}, "
        f"{study.run.mixed_dtype}, torch {torch.__version__}"
    )


# All cells


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that failed, and why."""

    cell: Cell
    why: str


@dataclass(frozen=True, slots=True)
class Running:
    """Progress of a running cell."""

    cell: Cell
    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a study."""

    done: int
    planned: int
    running: tuple[Running, ...]
    ended: CellResult | Failure | None
    """What came of a cell that has just ended."""


def run_study(
    study: StudyConfig,
    folder: StudyFolder,
    *,
    workers: int = 1,
    keep_models: bool = False,
    go_on: str = "the same command",
    say: Say = lambda _: None,
    on_stage: OnStage = lambda _stage, _done, _total: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> list[Failure]:
    """Run the cells that are missing, `workers` at a time, each in its own process; gives those that failed.

    A signal ends the processes, and keeps what is finished. Raises as `prepare`, BadArtifact for a cell whose file is
    damaged, and Interrupted, which names `go_on`.
    """
    cells = grid(study)
    try:
        with _ended_by_signals():
            torch.set_num_threads(study.threads)
            prepare(study, folder, say=say, on_stage=on_stage)
            done = folder.read_cells(study, cells)
            missing = [cell for cell in cells if cell not in done]
            start = partial(_Child, study, folder, keep_models=keep_models)
            return _run_all(start, missing, workers, len(cells), on_progress)
    except KeyboardInterrupt:
        count = len(folder.read_cells(study, cells))
        raise Interrupted("the study", f"{count} of {len(cells)} cells are in {folder.path}", go_on) from None


def _run_all(
    start: Callable[[Cell], _Child],
    waiting: list[Cell],
    workers: int,
    planned: int,
    on_progress: Callable[[Progress], None],
) -> list[Failure]:
    running, failures = list[_Child](), list[Failure]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(start(waiting.pop(0)))
            ended = next((child for child in running if child.process.poll() is not None), None)
            result = ended.result() if ended else None
            if ended:
                running.remove(ended)
            if isinstance(result, Failure):
                failures.append(result)
            done = planned - len(waiting) - len(running) - len(failures)
            on_progress(Progress(done, planned, tuple(child.look() for child in running), result))
            if not ended:
                time.sleep(POLL)
    finally:
        for child in running:
            child.end()
    return failures


class _Child:
    """A process that runs a cell; it is in a group of its own, so that Ctrl-C reaches this process alone."""

    def __init__(self, study: StudyConfig, folder: StudyFolder, cell: Cell, *, keep_models: bool) -> None:
        self.study, self.folder, self.cell = study, folder, cell
        self.seen = Running(cell, *_BEGUN)
        self.log = folder.of(cell) / LOG_FILE
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "cdm_toolkit.compare.worker", str(folder.path), cell.name]
        threads = str(study.threads)
        # another process may write to the log
        with self.log.open("ab" if is_held(self.log.parent) else "wb") as log:
            self.process = subprocess.Popen(
                [*words, "keep"] if keep_models else words,
                env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as stream:
            stream.write(study.model_dump_json(exclude_unset=True).encode())

    def look(self) -> Running:
        """Read its progress; the last known one while the file is being written, or after it has ended."""
        self.seen = _read_progress(self.cell, self.log.with_name(PROGRESS_FILE)) or self.seen
        return self.seen

    def result(self) -> CellResult | Failure:
        """Read what it has left: a result, or its last line, or the signal that ended it."""
        status = self.process.returncode
        stored = self.folder.read_cell(self.study, self.cell) if status == 0 else None
        if stored:
            return stored.result
        if status < 0:
            memory = " (perhaps for want of memory: fewer `workers`)" if -status == signal.SIGKILL else ""
            return Failure(self.cell, f"ended by signal {-status}{memory}")
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return Failure(self.cell, lines[-1] if lines else "it said nothing")

    def end(self) -> None:
        """End it in the middle of a cell, or waiting for another that is: of its own nothing is kept."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if not is_held(self.log.parent):
            shutil.rmtree(self.log.with_name(SCRATCH), ignore_errors=True)
            self.log.with_name(PROGRESS_FILE).unlink(missing_ok=True)


def _read_progress(cell: Cell, file: Path) -> Running | None:
    """Read how far a cell is; None where its process is just writing that, or has not begun to."""
    try:
        return Running(cell, *json.loads(file.read_bytes()))
    except (OSError, ValueError):
        return None


def running_cell(folder: StudyFolder, cell: Cell) -> Running | None:
    """Say how far a cell is that some process runs just now; None where none does."""
    if not is_held(folder.of(cell)):
        return None
    return _read_progress(cell, folder.of(cell) / PROGRESS_FILE) or Running(cell, *_BEGUN)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Take SIGTERM and SIGHUP for Ctrl-C, so that no process is left behind. In the main thread only."""

    def stop(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
