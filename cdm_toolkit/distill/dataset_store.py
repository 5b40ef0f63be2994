"""Aligned rows on disk: Arrow files that are mapped into memory, in a folder of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from cdm_toolkit.artifacts.atomic import atomic_write
from cdm_toolkit.artifacts.manifest import FileSum, Format, sums_of, write_json
from cdm_toolkit.artifacts.provenance import Provenance
from cdm_toolkit.errors import BadArtifact, FileProblem
from cdm_toolkit.kd.aligned_rows import AlignedRow, AlignedTeacherRow

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Bool, Int8, Int32, Int64

FORMAT = Format(
    "cdm-toolkit features",
    5,
    "remove the folder; the features are then made anew",
    code=(
        "batching.py",
        "forward.py",
        "hub/token_entropies.py",
        "tokdiff",
        "alignment",
        "kd",
        "distill/dataset.py",
        "distill/dataset_store.py",
    ),
)
HEADER = "header.json"
TRAINED, EMPTY, TOO_LONG = range(3)
PART = 4096
"""Rows of a file, a multiple of those that are made together."""


def to_table(
    numbers: Sequence[int], made: Sequence[tuple[int, AlignedRow | None, bool]], teachers: int
) -> pa.Table:
    """Lay rows out in columns: for each its number, what became of it, and where it is trained its features."""
    import pyarrow as pa

    none = AlignedTeacherRow(np.empty(0, np.int32), np.empty((0, 4), np.int32))
    nothing = AlignedRow(0, none.ids, np.empty((0, 2), np.int32), (none,) * teachers)
    rows = [features or nothing for _outcome, features, _was_cut in made]
    columns = {
        "row": pa.array(numbers, pa.int64()),
        "outcome": pa.array([outcome for outcome, *_ in made], pa.int8()),
        "cut": pa.array([was_cut for *_, was_cut in made], pa.bool_()),
        "labels": pa.array([row.labels for row in rows], pa.int32()),
        "student_turns": _lists([row.turns.reshape(-1) for row in rows]),
        "student_ids": _lists([row.student_ids for row in rows]),
    }
    for nth in range(teachers):
        columns[f"teacher_{nth}_ids"] = _lists([row.teachers[nth].ids for row in rows])
        columns[f"teacher_{nth}_groups"] = _lists([row.teachers[nth].groups.reshape(-1) for row in rows])
    return pa.table(columns)


def _lists(arrays: Sequence[Int32[np.ndarray, " _"]]) -> pa.ListArray:
    import pyarrow as pa

    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays), pa.int32()))


class _Lists:
    """A column of lists, each of which is a view into the file."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self.values: list[Int32[np.ndarray, " _"]] = [chunk.values.to_numpy() for chunk in chunks]
        self.chunk = np.repeat(np.arange(len(chunks), dtype=np.int32), [len(chunk) for chunk in chunks])
        self.first = np.concatenate([one[:-1] for one in offsets])
        self.end = np.concatenate([one[1:] for one in offsets])

    def __getitem__(self, index: int) -> Int32[np.ndarray, " _"]:
        part: Int32[np.ndarray, " _"] = self.values[self.chunk[index]][self.first[index] : self.end[index]]
        return part

    def lengths(self) -> Int64[np.ndarray, " row"]:
        lengths: Int64[np.ndarray, " row"] = (self.end - self.first).astype(np.int64)
        return lengths


class LazyRows(Sequence[AlignedRow]):
    """Rows of which each is made when it is asked for, and a slice is a list."""

    def row(self, nth: int) -> AlignedRow:
        """Make one row."""
        raise NotImplementedError

    @overload
    def __getitem__(self, nth: int) -> AlignedRow: ...
    @overload
    def __getitem__(self, nth: slice) -> list[AlignedRow]: ...
    def __getitem__(self, nth: int | slice) -> AlignedRow | list[AlignedRow]:
        return [self.row(i) for i in range(len(self))[nth]] if isinstance(nth, slice) else self.row(nth)


class AlignedDataset(LazyRows):
    """The rows of a folder that are trained on, each made when it is asked for; arrays are read-only views."""

    lengths: Int64[np.ndarray, " row"]
    """Tokens of the longest side of each row."""
    student_lengths: Int64[np.ndarray, " row"]
    label_counts: Int64[np.ndarray, " row"]
    teacher_lengths: list[Int64[np.ndarray, " row"]]
    """For each teacher."""

    def __init__(self, folder: Path) -> None:
        """Map the folder's files. Raises BadArtifact where they are not what was written."""
        self.folder = folder
        table = _open(folder)
        self.outcome: Int8[np.ndarray, " read"] = table["outcome"].to_numpy()
        self.cut: Bool[np.ndarray, " read"] = table["cut"].to_numpy()
        self._index = np.flatnonzero(self.outcome == TRAINED)
        self._row = table["row"].to_numpy()
        self._student, self._turns = _Lists(table["student_ids"]), _Lists(table["student_turns"])
        count = sum(name.endswith("_groups") for name in table.column_names)
        self._teachers = [
            (_Lists(table[f"teacher_{nth}_ids"]), _Lists(table[f"teacher_{nth}_groups"]))
            for nth in range(count)
        ]
        self.numbers: Int64[np.ndarray, " row"] = self._row[self._index]
        self.student_lengths = self._student.lengths()[self._index]
        self.label_counts = table["labels"].to_numpy()[self._index]
        self.teacher_lengths = [ids.lengths()[self._index] for ids, _ in self._teachers]
        self.lengths = np.max([self.student_lengths, *self.teacher_lengths], axis=0)

    def __len__(self) -> int:
        return len(self._index)

    def row(self, nth: int) -> AlignedRow:
        index = self._index[nth]
        return AlignedRow(
            row=int(self._row[index]),
            student_ids=self._student[index],
            turns=self._turns[index].reshape(-1, 2),
            teachers=tuple(
                AlignedTeacherRow(ids[index], groups[index].reshape(-1, 4)) for ids, groups in self._teachers
            ),
        )

    def __reduce__(self) -> tuple[type[AlignedDataset], tuple[Path]]:
        """Go to another process by the name of the folder."""
        return AlignedDataset, (self.folder,)

    def without_groups(self) -> Bool[np.ndarray, "teacher row"]:
        """Tell which rows have no groups with which teacher."""
        lengths = [groups.lengths()[self._index] for _, groups in self._teachers]
        none: Bool[np.ndarray, "teacher row"] = np.reshape(lengths, (len(lengths), len(self))) == 0
        return none


class PartWriter:
    """Write tables into parts of `PART` rows, each of which appears under its name when it is whole.

    What an earlier process has left in the folder is kept: `done` are its rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts, self.done = folder, 0, 0
        self._begun: list[pa.Table] = []
        while (rows := _rows_of_part(self._path)) == PART:
            self.parts, self.done = self.parts + 1, self.done + rows

    @property
    def _path(self) -> Path:
        return self.folder / f"part-{self.parts:05}.arrow"

    def add(self, table: pa.Table) -> None:
        """Add the next rows."""
        self._begun.append(table)
        self.done += len(table)
        if sum(map(len, self._begun)) >= PART:
            self.flush()

    def flush(self) -> None:
        """Write the part that is begun."""
        import pyarrow as pa

        if not self._begun:
            return
        table = pa.concat_tables(self._begun).combine_chunks()
        with (
            atomic_write(self._path) as stream,
            pa.ipc.new_stream(stream, table.schema) as writer,
        ):
            writer.write_table(table)
        self.parts, self._begun = self.parts + 1, []


def _rows_of_part(file: Path) -> int:
    """Count the rows of a part; none where it is not there, or is damaged."""
    import pyarrow as pa

    if not file.is_file():
        return 0
    try:
        return len(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
    except pa.ArrowException:
        return 0


def write_header(folder: Path, rows: int, made_by: Provenance) -> None:
    """Seal a folder of Arrow files: their sizes tell a file that is whole from one that was cut short."""
    files = sums_of(folder, folder.glob("*.arrow"))
    write_json(folder / HEADER, FORMAT.header(made_by, rows=rows, files=files))


def _open(folder: Path) -> pa.Table:
    """Map the files of a folder, in order."""
    import pyarrow as pa

    try:
        header = FORMAT.read(folder / HEADER)
        for name, file in header["files"].items():
            FileSum(**file).check_size(folder / name, FORMAT.again)
        files = [str(folder / name) for name in sorted(header["files"])]
        table = pa.concat_tables([pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in files])
    except (
        FileProblem,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        pa.ArrowException,
    ) as error:
        raise BadArtifact(folder, f"it cannot be read ({error})", FORMAT.again) from None
    if len(table) != header.get("rows"):
        raise BadArtifact(folder, "it does not have the rows that were written", FORMAT.again)
    return table


def open_or_make(folder: Path, make: Callable[[], None]) -> AlignedDataset:
    """Open a folder of features; where there is none, or a damaged one, have it made first."""
    import shutil

    if folder.is_dir():
        try:
            return AlignedDataset(folder)
        except BadArtifact:
            shutil.rmtree(folder)
    make()
    return AlignedDataset(folder)
