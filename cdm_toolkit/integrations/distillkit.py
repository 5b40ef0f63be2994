"""DistillKit's sets of teacher log-probabilities (github.com/arcee-ai/DistillKit), read as they are.

A row of a set has `input_ids` and, compressed, the candidates that a teacher predicted after each of them. The set is
opened through `datasets`, which maps it into memory: of parquet files it makes an Arrow copy in its own cache once,
since rows of a run are looked up in any order. A row may hold several texts. DistillKit packs them after it has asked
the teacher about each alone, and numbers them in `attention_mask`; each is a row of the run here, as is what stands
between special tokens that begin or end a text. Where a set says in `labels` what is learned, only that is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdm_toolkit.artifacts.teacher_cache import DECODED_ROWS, CachedRow
from cdm_toolkit.artifacts.teacher_packing import MIN_LOGPROB, MIN_REST
from cdm_toolkit.errors import BadArtifact, BadRow, FileProblem, MissingExtra, TokenizerMismatch
from cdm_toolkit.integrations.distillkit_format import (
    CONFIG_FILE,
    Columns,
    Compression,
    Uncompressed,
    read_compression,
)
from cdm_toolkit.kd.given_ids import row_of_chat_ids, row_of_ids
from cdm_toolkit.kd.rows import Row, RowFault

if TYPE_CHECKING:
    from jaxtyping import Bool, Int32, Int64

    from cdm_toolkit.kd.rows import Learn
    from cdm_toolkit.tokdiff.view import TokenizerView

IDS, TEXTS, LABELS = "input_ids", "attention_mask", "labels"
"""Columns that every set has or may have: ids; the number of the text that each is of, 0 for padding; −100 where
nothing is learned."""
SPARE_IDS = 0.02
"""Share by which a vocabulary may be larger than its tokenizer: embeddings have rows to spare."""
TOO_MUCH = 1.5
"""Sum of the candidates' probabilities that no rounding makes of 1."""
RECORDS = 64


# Opening


@dataclass(frozen=True, slots=True)
class SetFiles:
    """Where a set is: a folder of parquet files or of `save_to_disk`, a file, a pattern, or an id on the hub."""

    path: str
    split: str = "train"
    config: str | None = None
    """Of the data set on the hub, where it has several."""
    compression: str | None = None
    """The file that says how it is compressed, where `compression_config.yaml` is not beside it."""

    def table(self) -> Any:
        """Open it as a `datasets.Dataset` with columns of Arrow. FileProblem, MissingExtra."""
        place = Path(self.path).expanduser()
        with _datasets(self.path) as datasets:
            if place.is_dir() and (found := _saved(place, self.split)):
                return datasets.load_from_disk(str(found)).with_format("arrow")
            if files := _parquet_files(place):
                loaded = datasets.load_dataset("parquet", data_files=files, split="train")
                return loaded.with_format("arrow")
            name, _, revision = self.path.partition("@")
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or place.suffix == ".parquet":
                fix = "give a folder with parquet files, a pattern such as set/*.parquet, or a data set on the hub"
                raise FileProblem(self.path, "there is no such set", fix)
            loaded = datasets.load_dataset(name, self.config, split=self.split, revision=revision or None)
            return loaded.with_format("arrow")

    def read_compression(self) -> Compression:
        """Read how it is compressed. FileProblem where no file says so, BadSettings."""
        if self.compression is not None:
            return read_compression(Path(self.compression).expanduser())
        place = Path(self.path).expanduser()
        if place.is_dir() or place.suffix == ".parquet" or "*" in self.path:
            folder = place if place.is_dir() else place.parent
            return read_compression(folder / CONFIG_FILE)
        return read_compression(self._of_hub())

    def _of_hub(self) -> Path:
        from huggingface_hub import hf_hub_download

        name, _, revision = self.path.partition("@")
        try:
            return Path(hf_hub_download(name, CONFIG_FILE, repo_type="dataset", revision=revision or None))
        except Exception:  # of huggingface_hub and the HTTP library below it
            return Path(self.path) / CONFIG_FILE  # which is missing, as is then said


def _saved(folder: Path, split: str) -> Path | None:
    return next((place for place in (folder / split, folder) if (place / "state.json").is_file()), None)


def _parquet_files(place: Path) -> list[str]:
    """Find parquet files, in the order of the numbers in their names."""
    if place.is_file():
        return [str(place)]
    root, pattern = (
        (place, "*.parquet") if place.is_dir() else (Path(place.anchor), str(place.relative_to(place.anchor)))
    )
    found = (
        [file for file in root.glob(pattern) if file.is_file()] if place.is_dir() or "*" in pattern else []
    )
    return [str(file) for file in sorted(found, key=_natural)]


def _natural(file: Path) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(file))]


@contextmanager
def _datasets(path: str) -> Iterator[Any]:
    """Give the library, with its bars off; what it raises about a path becomes FileProblem."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "train", "reading a set of log-probabilities") from None
    bars = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    except FileProblem:
        raise
    except Exception as error:  # of datasets, pyarrow, huggingface_hub and the HTTP library below them
        said = " ".join(str(error).split())[:200]
        fix = "check its name, its `split` and the network, or give files"
        raise FileProblem(path, f"it cannot be opened ({type(error).__name__}: {said})", fix) from None
    finally:
        if bars:
            datasets.enable_progress_bars()


# Rows


class IdRows:
    """The texts of a set, numbered from 1 in its order: rows whose ids are given.

    Where each is in the set is found out in one pass over the ids, and takes 16 bytes of memory a text.
    """

    def __init__(self, name: str, table: Any, view: TokenizerView, learn: Learn = "all") -> None:
        """Take an open set and the tokenizer that its ids are of. BadArtifact for a set without ids."""
        if IDS not in table.column_names:
            has = ", ".join(table.column_names)
            raise BadArtifact(name, f"it has no column {IDS}, but {has}", "give a set that holds token ids")
        self.name, self.table, self.view, self.learn = name, table, view, learn
        self._ids = table.select_columns([c for c in (IDS, TEXTS, LABELS) if c in table.column_names])

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Row]:
        """Read the rows. BadRow for a chat that cannot be told apart, and for ids that the tokenizer has not."""
        of_text = 0
        for first in range(0, len(self._ids), RECORDS):
            ids, _, labels, starts = _flat(self._ids[first : first + RECORDS])
            while of_text < len(self.texts) and (place := self.texts[of_text])[0] < first + RECORDS:
                record, begin, end = place.tolist()
                at = int(starts[record - first])
                learned = None if labels is None else labels[at + begin : at + end] >= 0
                of_text += 1
                yield self._row(of_text, ids[at + begin : at + end], learned)

    def _row(
        self, number: int, ids: Int32[np.ndarray, " time"], learned: Bool[np.ndarray, " time"] | None
    ) -> Row:
        try:
            if (row := row_of_chat_ids(number, self.view, ids, learned, learn=self.learn)) is not None:
                return row
            return row_of_ids(number, self.view, ids, None if learned is None else _runs(learned))
        except RowFault as error:
            raise BadRow(self.name, number, *error.args) from None

    @cached_property
    def texts(self) -> Int64[np.ndarray, "text 3"]:
        """The record of each text, and its first and last but one index there. TokenizerMismatch for unknown ids."""
        found = []
        for first in range(0, len(self._ids), RECORDS):
            ids, texts, _, starts = _flat(self._ids[first : first + RECORDS])
            self._check(ids)
            begin, end = _texts(self.view, ids, texts, starts)
            record = np.searchsorted(starts, begin, "right") - 1
            found.append(np.stack((record + first, begin - starts[record], end - starts[record]), 1))
        return np.concatenate(found) if found else np.empty((0, 3), np.int64)

    def _check(self, ids: Int32[np.ndarray, " time"]) -> None:
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.view.vocab_size:
            highest = f"ids up to {ids.max():,}"
            raise TokenizerMismatch.by_size(self.name, highest, self.view.name, self.view.vocab_size)


_Flat = tuple[Any, Any, Any, Any]


def _flat(table: Any) -> _Flat:
    """Give ids, numbers of texts, labels (None where there are none) and where each record begins."""
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    ids = _values(columns[IDS]).astype(np.int32)
    lengths = columns[IDS].value_lengths().to_numpy(zero_copy_only=False)
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))[:-1]
    texts, labels = (_values(columns[name]) if name in columns else None for name in (TEXTS, LABELS))
    return ids, np.ones(len(ids), np.int64) if texts is None else texts, labels, starts


def _values(column: Any) -> np.ndarray:
    """Flatten lists, of lists too, into their numbers."""
    while hasattr(column, "flatten") and hasattr(column, "value_lengths"):
        column = column.flatten()
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _texts(
    view: TokenizerView,
    ids: Int32[np.ndarray, " time"],
    texts: Int64[np.ndarray, " time"],
    starts: Int64[np.ndarray, " record"],
) -> tuple[Int64[np.ndarray, " text"], Int64[np.ndarray, " text"]]:
    """Find where texts begin and end: where their number changes, before a bos, after an eos.

    A record whose texts are numbered has no others. Special tokens alone are no text: they begin the one that follows.
    """
    if not len(ids):
        return (np.empty(0, np.int64),) * 2
    record = np.searchsorted(starts, np.arange(len(ids)), "right") - 1
    hard = np.diff(record, prepend=-1) != 0
    hard[1:] |= texts[1:] != texts[:-1]
    soft = _has_role(view, ids, "bos")
    speaks = np.isin(ids, [token.id for token in view.special.values() if _SPEAKERS & token.roles])
    soft[1:] |= _has_role(view, ids[:-1], "eos") & ~speaks[1:]
    numbered = np.zeros(len(starts), bool)
    numbered[record[texts > 1]] = True
    spelling = ~view.is_special[ids] & (texts != 0)
    begin = np.flatnonzero(hard | (soft & ~numbered[record]))
    spells = np.add.reduceat(spelling, begin) > 0
    joined = np.zeros(len(begin), bool)
    joined[1:] = ~spells[:-1] & ~hard[begin[1:]]
    begin = begin[~joined]
    end, spells = np.append(begin[1:], len(ids)), np.add.reduceat(spelling, begin) > 0
    return begin[spells], end[spells]


_SPEAKERS = {"role_user", "role_assistant", "role_system"}
"""Roles of markers before which an eos ends a turn of a chat, not the chat."""


def _has_role(view: TokenizerView, ids: Int32[np.ndarray, " time"], role: str) -> Bool[np.ndarray, " time"]:
    return np.isin(ids, [token.id for token in view.special.values() if token.role == role])


def _runs(learned: Bool[np.ndarray, " time"]) -> Int32[np.ndarray, "turn 2"]:
    """Give the stretches that are learned; the first token has none before it that predicts it."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], learned, [False])).astype(np.int8)))
    runs = np.maximum(edges.reshape(-1, 2), 1).astype(np.int32)
    return runs[runs[:, 0] < runs[:, 1]]


# Candidates


class DistillKitSet:
    """The candidates of a set's texts, by the numbers that `IdRows` gives them."""

    def __init__(self, files: SetFiles, view: TokenizerView, *, table: Any = None) -> None:
        """Open a set, or take one that is open.

        FileProblem where it is not there, or nothing says how it is compressed. BadSettings for a way to compress that
        is not known. TokenizerMismatch where its vocabulary is not the tokenizer's. BadArtifact without candidates.
        """
        self.folder, self.view = Path(files.path), view
        self.rows = IdRows(files.path, files.table() if table is None else table, view)
        raw = set(Uncompressed.columns) <= set(self.rows.table.column_names)
        self.compression: Compression = Uncompressed() if raw else files.read_compression()
        _check_vocabulary(files.path, self.compression.vocab, view)
        missing = [name for name in self.compression.columns if name not in self.rows.table.column_names]
        if missing:
            has = ", ".join(self.rows.table.column_names)
            fix = "give the settings that it was compressed with as `compression`"
            raise BadArtifact(files.path, f"it has no column {missing[0]}, but {has}", fix)
        self._row = lru_cache(DECODED_ROWS)(self._looked_up)

    @cached_property
    def k(self) -> int:
        """Candidates at each position."""
        stated: int | None = getattr(self.compression, "k", None)
        return self.row(1).ids.shape[1] if stated is None else stated

    is_whole = False
    """There are candidates, in order of their probability."""

    def row(self, number: int) -> CachedRow:
        """Look up the candidates of a text. BadArtifact where there is none of this number, or it cannot be read."""
        return self._row(number)

    def unknown_share(self) -> tuple[float, int]:
        """Give the share of tokens that are no candidates where they stand, in so many of the first texts."""
        rows = [self.row(number) for number in range(1, min(len(self.rows), RECORDS) + 1)]
        following = [row.token_ids[row.first + 1 :, None] for row in rows]
        known = [(row.ids == ids).any(-1) for row, ids in zip(rows, following, strict=True)]
        return 1 - float(np.concatenate(known).mean()), len(rows)

    def _looked_up(self, number: int) -> CachedRow:
        if not 1 <= number <= len(self.rows):
            problem = f"it has no row {number}, but {len(self.rows):,} with texts"
            raise BadArtifact(self.folder, problem, "give a set of token ids that spell texts as `data.path`")
        record, begin, end = self.rows.texts[number - 1].tolist()
        table = self.rows.table[record]
        ids = _values(table.column(IDS).combine_chunks()).astype(np.int32)
        try:
            columns = {name: _matrix(table, name) for name in self.compression.columns}
            self._check_length(record, len(ids), columns)
            first = begin + _first_read(table, begin, end)
            of_text = {name: column[first : end - 1] for name, column in columns.items()}
            found, logprobs = self.compression.decode(of_text)
        except ValueError as error:
            raise BadRow(self.folder, record + 1, str(error), f"give the {CONFIG_FILE} of this set") from None
        self._check_logprobs(record, logprobs)
        logprobs = np.maximum(logprobs, np.float32(MIN_LOGPROB))
        unknown = found >= self.view.vocab_size
        if (unknown & (logprobs > MIN_LOGPROB)).any():
            highest = f"candidates up to {found.max():,}"
            raise TokenizerMismatch.by_size(self.rows.name, highest, self.view.name, self.view.vocab_size)
        found = np.where(unknown, 0, found).astype(np.int32)
        following = next_logprobs(found, logprobs, ids[first + 1 : end])
        return CachedRow(number, ids[begin:end], first - begin, found, logprobs, following)

    def _check_length(self, record: int, length: int, columns: Columns) -> None:
        """The last id may have no candidates: nothing follows it that a server was asked about."""
        for name, column in columns.items():
            if len(column) not in (length, length - 1):
                problem = f"it has {length} ids, and {name} for {len(column)} of them"
                raise BadRow(self.folder, record + 1, problem, "leave the row out, or make the set anew")

    def _check_logprobs(self, record: int, logprobs: np.ndarray) -> None:
        if np.isnan(logprobs).any() or (logprobs == np.inf).any():
            fix = f"give the {CONFIG_FILE} of this set, or leave the row out"
            raise BadRow(self.folder, record + 1, "its log-probabilities are not finite", fix)
        if len(logprobs) and (most := float(np.exp(logprobs.clip(max=30)).sum(-1).max())) > TOO_MUCH:
            problem = f"the probabilities of its candidates sum up to {most:.3g}"
            fix = f"give the {CONFIG_FILE} of this set; a set of logits cannot be read"
            raise BadRow(self.folder, record + 1, problem, fix)


def _check_vocabulary(name: str, vocab: int | None, view: TokenizerView) -> None:
    """DistillKit counts one id more or less than a tokenizer has, and an embedding may have rows to spare."""
    if vocab is not None and not view.vocab_size - 1 <= vocab <= view.vocab_size * (1 + SPARE_IDS) + 1:
        raise TokenizerMismatch.by_size(name, f"a vocabulary of {vocab:,}", view.name, view.vocab_size)


def _first_read(table: Any, begin: int, end: int) -> int:
    """Give the position in a text that predicts the first token to learn; what stands before it is not read."""
    if LABELS not in table.column_names:
        return 0
    learned = _values(table.column(LABELS).combine_chunks())[begin:end] >= 0
    return max(int(learned.argmax()) - 1, 0) if learned.any() else end - begin - 1


def _matrix(table: Any, name: str) -> np.ndarray:
    """Give a column of one record, one row a position."""
    column = table.column(name).combine_chunks().flatten()
    sizes = (
        np.unique(column.value_lengths().to_numpy(zero_copy_only=False)) if len(column) else np.zeros(1, int)
    )
    if len(sizes) > 1:
        raise ValueError(f"{name} has {sizes[0]} to {sizes[-1]} values at a position")
    values = _values(column)
    return values.reshape(len(column), int(sizes[0]))


def next_logprobs(
    ids: Int32[np.ndarray, "position topk"], logprobs: np.ndarray, following: Int32[np.ndarray, " position"]
) -> np.ndarray:
    """Give the log-probability of the token that follows each position.

    A set does not hold it where the token is no candidate: it is then the most that it can be, which is that of the
    last candidate, and what the candidates leave of 1.
    """
    found = ids == following[:, None]
    rest = np.log(np.maximum(1 - np.exp(logprobs.astype(np.float64)).sum(-1), MIN_REST))
    most = np.minimum(logprobs.min(-1, initial=0), rest)
    there = np.take_along_axis(logprobs, found.argmax(-1)[:, None], 1)[:, 0] if ids.shape[1] else most
    return np.where(found.any(-1), there, most).astype(np.float32)
