"""Rows to features, once, before training: tokenized by all sides, aligned, cut to length."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.artifacts.code_fingerprint import code_fingerprint
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.distill.dataset_store import (
    EMPTY,
    FORMAT,
    TOO_LONG,
    TRAINED,
    AlignedDataset,
    open_or_make,
    to_table,
    write_header,
)
from cdm_toolkit.errors import BadOption, MissingExtra
from cdm_toolkit.hub.cache_entries import make_entry
from cdm_toolkit.kd.aligned_rows import AlignedRow, align_groups, truncate_aligned
from cdm_toolkit.kd.rows import Message, Row, rows_fingerprint
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
    from jaxtyping import Float, Int32

BATCH = 128
"""Rows that are encoded in one call."""
WINDOW = 1024
"""Rows of which entropies are asked for in one call, so that texts of like length can run together."""
ROWS_FOR_A_PROCESS = 2000
"""Fewer are not worth a process's start, which takes seconds: it makes all vocabularies anew."""
WEIGHED = ("anchored", "entropy-dtw")
"""Aligners that look at entropies."""
POLL = 0.1
"""Seconds between two looks at how far the processes are."""


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
    """What became of the rows. `read` = `trained` + `empty` + `too_long`."""

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

    def __str__(self) -> str:
        names = [field.name for field in fields(self) if field.name != "unaligned_with"]
        counts = ", ".join(f"{getattr(self, name)} {name.replace('_', ' ')}" for name in names)
        each = ", ".join(map(str, self.unaligned_with))
        return f"{counts} (unaligned with each teacher: {each})" if each else counts


def build_dataset(
    rows: Sequence[Row],
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
    rendering, up to the end of the last turn; labels are the last message and that end. Where both sides have an
    end, these two are a group. Without teachers (`sft`) there are no groups.

    What comes out lies in the cache folder, named by all that goes in, and is read from there the next time;
    `workers` processes make it, where there are rows enough. `on_row` is told how many rows are done, now and
    then, by another thread where there are several processes. Raises MissingExtra, FileProblem where the cache
    cannot be written, and under `chat` UnsupportedTokenizer and BadOption.
    """
    if not rows:
        raise BadOption("the number of rows", 0, "at least one")
    task = _Task(student, tuple(teachers), max_length, template)
    weighed = entropies if any(teacher.aligner in WEIGHED for teacher in teachers) else None
    folder = cache_folder() / "features" / _fingerprint(rows, task, weighed)
    features = open_or_make(
        folder, lambda: _make(folder, rows, task, weighed, workers=workers, on_row=on_row)
    )
    on_row(len(rows))
    return features, _counts(features, len(teachers))


def _counts(features: AlignedDataset, teachers: int) -> RowCounts:
    became = np.bincount(features.outcome, minlength=3).tolist()
    without = features.without_groups()
    return RowCounts(
        read=len(features.outcome),
        trained=became[TRAINED],
        cut=int(features.cut[features.outcome == TRAINED].sum()),
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

    def __call__(self, table: pa.Table) -> pa.Table:
        """Make features of a batch of rows."""
        records = table.to_pylist()
        rows = [_row(record) for record in records]
        kept = [nth for nth, row in enumerate(rows) if has_completion(row, self.template)]
        tokenized = [tokenize_rows(side, [rows[nth] for nth in kept], self.template) for side in self.sides]
        made: list[tuple[int, AlignedRow | None, bool]] = [(EMPTY, None, False)] * len(rows)
        for nth, *of_row in zip(kept, *tokenized, strict=True):
            weights = [records[nth].get(f"entropy_{side}") for side in range(len(of_row))]
            made[nth] = self._align(rows[nth], of_row, weights)
        return to_table([row.number for row in rows], made, len(self.teachers))

    def _align(
        self, row: Row, tokenized: Sequence[TokenizedRow], weights: Sequence[list[float] | None]
    ) -> tuple[int, AlignedRow | None, bool]:
        student, *others = tokenized
        entropy_s, *entropies = (None if each is None else np.array(each) for each in weights)
        grouped = [
            (of_teacher, align_groups(of_teacher, student, teacher.aligner, entropy, entropy_s))
            for teacher, of_teacher, entropy in zip(self.teachers, others, entropies, strict=True)
        ]
        aligned, was_cut = truncate_aligned(row.number, student, grouped, self.max_length)
        if aligned.labels <= 0:
            return TOO_LONG, None, False
        return TRAINED, aligned, was_cut


def _record(row: Row) -> dict[str, Any]:
    return {
        "number": row.number,
        "prompt": row.prompt,
        "completion": row.completion,
        "messages": [message._asdict() for message in row.messages],
    }


def _row(record: dict[str, Any]) -> Row:
    messages = tuple(Message(**message) for message in record["messages"])
    return Row(record["number"], record["prompt"], record["completion"], messages)


def _fingerprint(rows: Sequence[Row], task: _Task, entropies: Entropies | None) -> str:
    """Hash all that the features depend on."""
    settings = [
        FORMAT.version,
        code_fingerprint(*FORMAT.code),
        rows_fingerprint(rows),
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
    rows: Sequence[Row],
    task: _Task,
    entropies: Entropies | None,
    *,
    workers: int,
    on_row: Callable[[int], None],
) -> None:
    """Make features and put them in a folder of the cache."""
    names = ("student", *(f"teacher {nth}" for nth in range(1, len(task.teachers) + 1)))
    made_by = provenance(
        fingerprints={name: side.view.fingerprint for name, side in zip(names, task.sides, strict=True)}
    )
    table = _source(rows, task, entropies)

    def fill(made: Path) -> None:
        _map(table, task, made, workers=min(workers, len(rows) // ROWS_FOR_A_PROCESS), on_row=on_row)
        write_header(made, len(rows), made_by)

    make_entry(folder, fill)


def _source(rows: Sequence[Row], task: _Task, entropies: Entropies | None) -> pa.Table:
    """Lay the rows out in columns, with the entropies that weigh their tokens."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns = [("number", pa.int64()), ("prompt", pa.string()), ("completion", pa.string())]
    schema = pa.schema([*columns, ("messages", pa.list_(message))])
    table = pa.Table.from_pylist([_record(row) for row in rows], schema)
    if entropies is None:
        return table
    for side, weights in _weights(rows, task, entropies).items():
        column = pa.array(weights, pa.list_(pa.float32()))
        table = table.append_column(f"entropy_{side}", column)
    return table


def _weights(
    rows: Sequence[Row], task: _Task, entropies: Entropies
) -> dict[int, list[Float[np.ndarray, " token"] | None]]:
    """Ask for the entropies along each row, of the student and of each teacher whose aligner looks at them."""
    asked = [0, *(nth for nth, teacher in enumerate(task.teachers, 1) if teacher.aligner in WEIGHED)]
    found: dict[int, list[Float[np.ndarray, " token"] | None]] = {side: [None] * len(rows) for side in asked}
    for first in range(0, len(rows), WINDOW):
        window = range(first, min(first + WINDOW, len(rows)))
        kept = [nth for nth in window if has_completion(rows[nth], task.template)]
        for side in asked:
            tokenized = tokenize_rows(task.sides[side], [rows[nth] for nth in kept], task.template)
            sequences = [row.ids[: task.max_length] for row in tokenized]
            along = entropies.along(side, sequences, vocab=task.sides[side].view.vocab_size)
            for nth, row, entropy in zip(kept, tokenized, along, strict=True):
                found[side][nth] = _of_body(row, entropy)
    return found


def _of_body(row: TokenizedRow, entropy: Float[np.ndarray, " time"]) -> Float[np.ndarray, " token"]:
    """Take the entropies of what is aligned; tokens beyond the longest length, which no model reads, have the mean."""
    inside = entropy[row.body_start : row.body_start + len(row.body)]
    beyond = np.full(len(row.body) - len(inside), inside.mean() if len(inside) else 0.0)
    return np.concatenate((inside, beyond)).astype(np.float32)


def _map(table: pa.Table, task: _Task, folder: Path, *, workers: int, on_row: Callable[[int], None]) -> None:
    """Run a task on all rows, into Arrow files of a folder."""
    try:
        from datasets import Dataset
    except ImportError:
        raise MissingExtra("datasets", "train", "making features") from None

    several = workers > 1
    progress = folder / "progress"
    function = (
        _Packed(pickle.dumps(task, pickle.HIGHEST_PROTOCOL), str(progress))
        if several
        else _Counted(task, on_row)
    )
    with _quiet(), _watched(progress, on_row) if several else nullcontext():
        Dataset(table).with_format("arrow").map(
            function,
            batched=True,
            batch_size=BATCH,
            remove_columns=table.column_names,
            num_proc=workers if several else None,
            cache_file_name=str(folder / "part.arrow"),
            new_fingerprint="features",
        )
    progress.unlink(missing_ok=True)


class _Counted:
    """A task in this process, which says how far it is."""

    def __init__(self, task: _Task, on_row: Callable[[int], None]) -> None:
        self.task, self.on_row, self.done = task, on_row, 0

    def __call__(self, table: pa.Table) -> pa.Table:
        made = self.task(table)
        self.done += len(table)
        self.on_row(self.done)
        return made


@dataclass(frozen=True, slots=True)
class _Packed:
    """A task as bytes, for a process that may share nothing with this one; it adds a byte a row to a file.

    Pickled in C, which datasets does not: two vocabularies take a tenth of a second and not several.
    """

    task: bytes
    progress: str

    def __call__(self, table: pa.Table) -> pa.Table:
        made = _unpack(self.task)(table)
        with Path(self.progress).open("ab") as file:
            file.write(bytes(len(table)))
        return made


@lru_cache(maxsize=1)
def _unpack(task: bytes) -> _Task:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of a process that has one core to itself
    unpacked: _Task = pickle.loads(task)
    return unpacked


@contextmanager
def _watched(progress: Path, on_row: Callable[[int], None]) -> Iterator[None]:
    """Tell, from a thread, how many rows the processes have done."""
    progress.touch()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL):
            on_row(progress.stat().st_size)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep datasets' own bars and logs off the screen."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()
