"""The rows of a run: one or several sources, read anew at each pass, never all in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdm_toolkit.distill.jsonl import data_file
from cdm_toolkit.distill.settings import SourceConfig
from cdm_toolkit.distill.tables import Numbered, read_hub, read_records
from cdm_toolkit.errors import BadRow, FileProblem
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.integrations.distillkit import IdRows, SetFiles
from cdm_toolkit.kd.rows import FIELDS, Row, RowFault, row_of, rows_fingerprint, shape_of

if TYPE_CHECKING:
    from jaxtyping import Int64

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ENDINGS = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".txt"}
"""What the name of a file ends with, where there is no such file: no data set of a hub is meant."""


@dataclass(frozen=True)
class Rows(Iterable[Row]):
    """The rows of sources, one after the other; their numbers go on from source to source, from 1.

    Each pass reads the files anew. The length and the fingerprint are those of one pass, which is made when they are
    first asked for. A pass raises FileProblem, and BadRow for the first row that is not as it must be.
    """

    sources: tuple[SourceConfig, ...]
    seed: int = 0
    """Of the rows that a source with `shuffle` takes."""

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self._by_source())

    def _by_source(self) -> Iterator[tuple[int, Row]]:
        """Give the rows with the index of their source."""
        last = 0
        for nth, source in enumerate(self.sources):
            before = last
            for row in _rows(source, self.seed):
                last = before + row.number
                yield nth, replace(row, number=last) if before else row

    def __len__(self) -> int:
        return self._facts.count

    @property
    def fingerprint(self) -> str:
        """Hash the contents of the rows, and their numbers."""
        return self._facts.fingerprint

    @cached_property
    def _facts(self) -> _Facts:
        count, last = 0, np.zeros(len(self.sources), np.int64)

        def counted() -> Iterator[Row]:
            nonlocal count
            for nth, row in self._by_source():
                count, last[nth] = count + 1, row.number
                yield row

        fingerprint = rows_fingerprint(counted())
        return _Facts(count, fingerprint, last)

    def source_of(self, numbers: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
        """Tell from which source the rows of these numbers are."""
        return np.searchsorted(self._facts.last, numbers)


@dataclass(frozen=True, slots=True, eq=False)
class _Facts:
    """What one pass over the rows tells; `last` is the number of each source's last row."""

    count: int
    fingerprint: str
    last: Int64[np.ndarray, " source"]


def read_rows(path: str | Path) -> list[Row]:
    """Read all rows of a file, a pattern or a data set on the hub. Raises as `Rows`."""
    return list(Rows((SourceConfig(path=str(path)),)))


def _rows(source: SourceConfig, seed: int) -> Iterator[Row]:
    """Read one source; its rows are numbered through its files."""
    if source.tokenizer is not None:
        yield from _id_rows(source, source.tokenizer, seed)
        return
    shape: tuple[str, ...] | None = None
    for place, at, number, record in _chosen(source, seed):
        try:
            fields = _named(record, source.columns)
            own = shape_of(fields)
            shape = shape or own
            if own != shape:
                problem = f"it has {' and '.join(own)}, and the rows before it {' and '.join(shape)}"
                raise RowFault(
                    problem, "give rows of one shape: a source for each, or `columns` that pick one"
                )
            yield row_of(number, fields, own, learn=source.learn)
        except RowFault as error:
            raise BadRow(place, at, *error.args) from None
    if shape is None:
        raise FileProblem(source.path, "it has no rows", f"give data whose rows have {FIELDS}")


def _id_rows(source: SourceConfig, tokenizer: str, seed: int) -> Iterator[Row]:
    """Read the texts of a set of token ids."""
    files = SetFiles(source.path, source.split, source.config)
    rows = IdRows(source.path, files.table(), load_tokenizer(tokenizer).view, source.learn)
    if not len(rows):
        raise FileProblem(source.path, "it has no rows", "give a set of token ids that spell texts")
    numbers = np.arange(1, len(rows) + 1)
    if source.limit is not None and source.shuffle:
        numbers = 1 + np.random.default_rng(seed).permutation(len(rows))
    wanted = np.zeros(len(rows) + 1, bool)
    wanted[numbers[: source.limit]] = True
    yield from (row for row in rows if wanted[row.number])


def _named(record: Any, columns: Mapping[str, str] | None) -> Any:
    """Give the fields that are named otherwise their own names."""
    if not columns or not isinstance(record, Mapping):
        return record
    if missing := [theirs for theirs in columns.values() if theirs not in record]:
        raise RowFault(f"it has no column {missing[0]!r}, but {', '.join(record)}", "mend `columns`")
    return {ours: record[theirs] for ours, theirs in columns.items()}


Placed = Iterator[tuple[str, int, int, Any]]
"""Records with the file that they are in, their number in it, and their number in the source."""


def _chosen(source: SourceConfig, seed: int) -> Placed:
    """Take as many records as the source allows: the first ones, or any by the seed."""
    if source.limit is None or not source.shuffle:
        yield from islice(_records(source), source.limit)
        return
    count = sum(1 for _ in _records(source))
    taken = set(np.random.default_rng(seed).permutation(count)[: source.limit].tolist())
    yield from (record for nth, record in enumerate(_records(source)) if nth in taken)


def _records(source: SourceConfig) -> Placed:
    last = 0
    for place, records in _parts(source):
        before = last
        for number, record in records:
            last = before + number
            yield place, number, last, record


def _parts(source: SourceConfig) -> Iterator[tuple[str, Numbered]]:
    """Open the files of a source, or its data set on the hub. Raises FileProblem."""
    files = _files(source)
    for file in files:
        yield str(file), read_records(file)
    if not files:
        name, _, revision = source.path.partition("@")
        yield source.path, read_hub(name, revision or None, source.config, source.split)


def _files(source: SourceConfig) -> Sequence[Path]:
    """Find the files that a path means; none where it is the id of a data set on the hub."""
    path = data_file(source.path)
    if path.is_dir():
        return _saved(path, source.split)
    if path.is_file():
        return [path]
    if any(character in source.path for character in "*?["):
        root = Path(path.anchor)
        found = sorted(file for file in root.glob(source.path.removeprefix(path.anchor)) if file.is_file())
        if not found:
            raise FileProblem(source.path, "no file matches")
        return found
    if HUB_ID.fullmatch(source.path.partition("@")[0]) and path.suffix not in ENDINGS:
        return []
    raise FileProblem(path, "there is no such file")


def _saved(folder: Path, split: str) -> Sequence[Path]:
    """Find the files of a data set that `save_to_disk` has written."""
    for place in (folder / split, folder):
        if (state := place / "state.json").is_file():
            content = json.loads(state.read_text(encoding="utf-8"))
            return [place / file["filename"] for file in content["_data_files"]]
    fix = f"give files, such as {folder}/*.parquet, or a folder that `Dataset.save_to_disk` has written"
    raise FileProblem(folder, "it is a folder", fix)
