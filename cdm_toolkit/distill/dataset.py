"""Rows to features, once, before training: tokenized by all sides, aligned, cut to length."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int32

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.artifacts.code_fingerprint import code_fingerprint
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.distill.dataset_store import (
    EMPTY,
    FORMAT,
    TOO_LONG,
    TRAINED,
    AlignedDataset,
    PartWriter,
    open_or_make,
    to_table,
    write_header,
)
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.errors import BadOption
from cdm_toolkit.hub.cache_entries import resumed_entry
from cdm_toolkit.kd.aligned_rows import AlignedRow, align_groups, truncate_aligned
from cdm_toolkit.kd.rows import Row, rows_fingerprint
from cdm_toolkit.kd.tokenized_rows import (
    TeacherSide,
    TemplateName,
    TokenizedRow,
    TokenizerSide,
    has_completion,
    tokenize_rows,
)

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 128
"""Rows that are encoded in one call."""
WINDOW = 1024
"""Rows of which entropies are asked for in one call, so that texts of like length can run together."""
ROWS_FOR_A_PROCESS = 2000
"""Fewer are not worth a process's start, which takes seconds: it makes all vocabularies anew."""
WEIGHED = ("anchored", "entropy-dtw")
"""Aligners that look at entropies."""
AHEAD = 4
"""Batches for each process that are read before they are asked for."""


Weights = Float[np.ndarray, " time"] | None
"""Entropies along the ids of a row; None where nobody looks at them."""
_Batch = tuple[list[Row], dict[int, list[Weights]]]
"""Rows, and by side (0 is the student) the weights of each."""


class Entropies(Protocol):
    """Gives how uncertain each model is along what it reads."""

    @property
    def fingerprint(self) -> str:
        """Name the models: other entropies have another one."""

    def along(
        self, side: int, sequences: Sequence[Int32[np.ndarray, " time"]], *, vocab: int
    ) -> Sequence[Float[np.ndarray, " time"]]:
        """Give the entropy of the prediction after each token; side 0 is the student, 1 the first teacher."""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """What became of the rows. `read` = `trained` + `held_out` + `empty` + `too_long`."""

    read: int = 0
    trained: int = 0
    cut: int = 0
    """Trained, but only up to a shared boundary: the whole is longer than max_length."""
    unaligned: int = 0
    """Trained, but by cross-entropy alone: no group of the completion has a teacher's side."""
    empty: int = 0
    too_long: int = 0
    """Left out: nothing of the completion is within max_length."""
    unaligned_with: tuple[int, ...] = ()
    """Trained, but without this teacher: one number for each, where there are several."""
    held_out: int = 0
    """Left out: evaluated on instead."""

    def __str__(self) -> str:
        names = [field.name for field in fields(self) if field.name != "unaligned_with"]
        if not self.held_out:
            names.remove("held_out")
        counts = ", ".join(f"{getattr(self, name)} {name.replace('_', ' ')}" for name in names)
        each = ", ".join(map(str, self.unaligned_with))
        return f"{counts} (unaligned with each teacher: {each})" if each else counts


def build_dataset(
    rows: Rows | Sequence[Row],
    student: TokenizerSide,
    teachers: Sequence[TeacherSide] = (),
    *,
    max_length: int = 512,
    template: TemplateName = "none",
    workers: int = 1,
    entropies: Entropies | None = None,
    on_row: Callable[[int], None] = lambda _done: None,
) -> tuple[AlignedDataset, RowCounts]:
    """Tokenize each row for all models, align, and cut what is too long at a shared boundary.

    `max_length` is in tokens of any side, with those that stand around the text. Under template `none` each side
    gets its own bos (or eos) at the start, and its own eos at the end of what is not cut; a token is a label when
    it begins in the completion, and one that straddles the boundary is not. Under `chat` each side reads its own
    rendering, up to the end of the last turn; labels are the turns that are learned, each with its end. Where both
    sides have an end, these two are a group. Without teachers (`sft`) there are no groups.

    What comes out lies in the cache folder, named by all that goes in, and is read from there the next time;
    `workers` processes make it, where there are rows enough. Rows are read as they are needed; what a process that was
    stopped has written is gone on from. `on_row` is told how many rows are done, now and then. Raises MissingExtra,
    FileProblem where the cache cannot be written, under `chat` UnsupportedTokenizer and BadOption, and what reading
    the rows raises.
    """
    if not len(rows):
        raise BadOption("the number of rows", 0, "at least one")
    task = _Task(student, tuple(teachers), max_length, template)
    weighed = entropies if any(teacher.aligner in WEIGHED for teacher in teachers) else None
    folder = cache_folder() / "features" / _fingerprint(rows, task, weighed)
    features = open_or_make(
        folder, lambda: _make(folder, rows, task, weighed, workers=workers, on_row=on_row)
    )
    on_row(len(rows))
    return features, count_rows(features, np.ones(len(features), bool))


def count_rows(features: AlignedDataset, trained: Bool[np.ndarray, " row"]) -> RowCounts:
    """Count what became of the rows, of which those are held out that are not `trained`."""
    became = np.bincount(features.outcome, minlength=3).tolist()
    without = features.without_groups()[:, trained]
    teachers = len(without)
    return RowCounts(
        read=len(features.outcome),
        trained=int(trained.sum()),
        held_out=int((~trained).sum()),
        cut=int(features.cut[features.outcome == TRAINED][trained].sum()),
        unaligned=int(without.all(axis=0).sum()) if teachers else 0,
        empty=became[EMPTY],
        too_long=became[TOO_LONG],
        unaligned_with=tuple(without.sum(axis=1).tolist()) if teachers > 1 else (),
    )


@dataclass(frozen=True, slots=True)
class _Task:
    """What is done to each row."""

    student: TokenizerSide
    teachers: tuple[TeacherSide, ...]
    max_length: int
    template: TemplateName

    @property
    def sides(self) -> tuple[TokenizerSide, ...]:
        return self.student, *(teacher.side for teacher in self.teachers)

    def __call__(self, batch: _Batch) -> pa.Table:
        """Make features of a batch of rows."""
        rows, entropies = batch
        kept = [nth for nth, row in enumerate(rows) if has_completion(row, self.template)]
        tokenized = [tokenize_rows(side, [rows[nth] for nth in kept], self.template) for side in self.sides]
        made: list[tuple[int, AlignedRow | None, bool]] = [(EMPTY, None, False)] * len(rows)
        for nth, *of_row in zip(kept, *tokenized, strict=True):
            weights = [entropies[side][nth] if side in entropies else None for side in range(len(of_row))]
            made[nth] = self._align(rows[nth], of_row, weights)
        return to_table([row.number for row in rows], made, len(self.teachers))

    def _align(
        self, row: Row, tokenized: Sequence[TokenizedRow], weights: Sequence[Weights]
    ) -> tuple[int, AlignedRow | None, bool]:
        student, *others = tokenized
        entropy_s, *entropies = weights
        grouped = [
            (of_teacher, align_groups(of_teacher, student, teacher.aligner, entropy, entropy_s))
            for teacher, of_teacher, entropy in zip(self.teachers, others, entropies, strict=True)
        ]
        aligned, was_cut = truncate_aligned(row.number, student, grouped, self.max_length)
        if aligned.labels <= 0:
            return TOO_LONG, None, False
        return TRAINED, aligned, was_cut


def _fingerprint(rows: Rows | Sequence[Row], task: _Task, entropies: Entropies | None) -> str:
    """Hash all that the features depend on."""
    settings = [
        FORMAT.version,
        code_fingerprint(*FORMAT.code),
        rows.fingerprint if isinstance(rows, Rows) else rows_fingerprint(rows),
        task.max_length,
        task.template,
        [_identity(side, task.template) for side in task.sides],
        [teacher.aligner for teacher in task.teachers],
        None if entropies is None else entropies.fingerprint,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _identity(side: TokenizerSide, template: TemplateName) -> list[Any]:
    written = [side.chat.source, side.chat.tokens] if template == "chat" and side.chat else None
    return [side.view.fingerprint, side.start, side.eos, written]


def _make(
    folder: Path,
    rows: Rows | Sequence[Row],
    task: _Task,
    entropies: Entropies | None,
    *,
    workers: int,
    on_row: Callable[[int], None],
) -> None:
    """Make features part by part, and put them in a folder of the cache."""
    names = ("student", *(f"teacher {nth}" for nth in range(1, len(task.teachers) + 1)))
    made_by = provenance(
        fingerprints={name: side.view.fingerprint for name, side in zip(names, task.sides, strict=True)}
    )
    workers = min(workers, len(rows) // ROWS_FOR_A_PROCESS)
    with resumed_entry(folder) as making:
        if making is None:  # another process has made it
            return
        writer = PartWriter(making)
        batches = _batches(islice(rows, writer.done, None), task, entropies)
        for table in _in_processes(task, batches, workers) if workers > 1 else map(task, batches):
            writer.add(table)
            on_row(writer.done)
        writer.flush()
        write_header(making, len(rows), made_by)


def _batches(rows: Iterable[Row], task: _Task, entropies: Entropies | None) -> Iterator[_Batch]:
    """Read a window of rows at a time, and ask for the entropies that weigh their tokens."""
    left = iter(rows)
    while window := list(islice(left, WINDOW)):
        weights = _weights(window, task, entropies) if entropies else {}
        for first in range(0, len(window), BATCH):
            part = slice(first, first + BATCH)
            yield window[part], {side: of_side[part] for side, of_side in weights.items()}


def _weights(rows: Sequence[Row], task: _Task, entropies: Entropies) -> dict[int, list[Weights]]:
    """Ask for the entropies along each row, of the student and of each teacher whose aligner looks at them."""
    asked = [0, *(nth for nth, teacher in enumerate(task.teachers, 1) if teacher.aligner in WEIGHED)]
    found: dict[int, list[Weights]] = {side: [None] * len(rows) for side in asked}
    kept = [nth for nth, row in enumerate(rows) if has_completion(row, task.template)]
    for side in asked:
        tokenized = tokenize_rows(task.sides[side], [rows[nth] for nth in kept], task.template)
        sequences = [row.ids[: task.max_length] for row in tokenized]
        along = entropies.along(side, sequences, vocab=task.sides[side].view.vocab_size)
        for nth, entropy in zip(kept, along, strict=True):
            found[side][nth] = entropy
    return found


def _in_processes(task: _Task, batches: Iterator[_Batch], workers: int) -> Iterator[pa.Table]:
    """Run a task in several processes, on a few batches ahead of what is taken; tables come in the batches' order.

    BadOption where a process is killed.
    """
    # pickled once: two vocabularies are megabytes
    packed = pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
    with ProcessPoolExecutor(workers, initializer=_unpack, initargs=(packed,)) as pool:
        try:
            ahead = deque(pool.submit(_run, batch) for batch in islice(batches, AHEAD * workers))
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(_run, batch) for batch in islice(batches, 1))
        except BrokenProcessPool:
            allowed = "fewer: a process that aligned rows was killed, as where memory runs out"
            raise BadOption("workers", workers, allowed) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_unpacked: list[_Task] = []
"""The task of a process of `_in_processes`."""


def _unpack(task: bytes) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of a process that has one core to itself
    _unpacked[:] = [pickle.loads(task)]


def _run(batch: _Batch) -> pa.Table:
    return _unpacked[0](batch)
