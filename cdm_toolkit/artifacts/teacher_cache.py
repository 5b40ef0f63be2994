"""Teacher cache on disk: top-k log-probabilities for every completion token of a data set (`cdm teacher cache`).

A folder with a header, `cache.json`, and shards of a fixed number of rows. A shard is `shard-00001.safetensors` and a
note, `shard-00001.json`, with its size and sha256; the note is written last. Shards are numbered across the whole
data set, so the shards of several machines are merged by copying them into one folder.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float32, Int32
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cdm_toolkit.artifacts.atomic import write_whole
from cdm_toolkit.artifacts.manifest import FileSum, read_json, validated, write_json
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.artifacts.teacher_encodings import pack_candidates, unpack_candidates
from cdm_toolkit.artifacts.teacher_header import FORMAT, HEADER_FILE, CacheHeader
from cdm_toolkit.artifacts.teacher_packing import id_bits, pack, unpack
from cdm_toolkit.errors import BadArtifact, FileProblem, TokenizerMismatch
from cdm_toolkit.tokdiff.view import TokenizerView

OPEN_SHARDS, DECODED_ROWS = 32, 64
"""How many of each a reader caches in memory."""


class ShardNote(BaseModel):
    """Metadata of a finished shard; `digest` is that of the cache it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    sha256: str
    size: int
    """In bytes."""
    rows: int
    first_row: int
    positions: int
    """Number of cached positions, one for each predicted token."""
    provenance: dict[str, Any]

    @property
    def file(self) -> FileSum:
        return FileSum(self.size, self.sha256)


@dataclass(frozen=True, slots=True, eq=False)
class CachedRow:
    """The teacher signal of one row.

    `token_ids` is the row as encoded for the teacher. Position `p` is at token `first + p` and predicts the token
    after it: the first position predicts the first token of the completion, the last position its last token.
    `ids` and `logprobs` are the top-k, most probable first, or the whole vocabulary in the order of ids if `k` is
    its size. `token_logprobs` are the log-probabilities of the tokens that follow in the row.
    """

    number: int
    token_ids: Int32[np.ndarray, " time_t"]
    first: int
    ids: Int32[np.ndarray, "position topk"]
    logprobs: Float32[np.ndarray, "position topk"]
    token_logprobs: Float32[np.ndarray, " position"]


_PER_ROW = ("number", "length", "first", "tokens")


def _pack_row(header: CacheHeader, row: CachedRow) -> dict[str, np.ndarray]:
    facts = {"number": row.number, "length": len(row.token_ids), "first": row.first}
    return {
        **{name: np.array([fact], np.int32) for name, fact in facts.items()},
        "tokens": pack(row.token_ids[None], id_bits(header.vocab))[0],
        "token_logprobs": row.token_logprobs.astype(header.dtype),
        **pack_candidates(header, row.ids, row.logprobs),
    }


def pack_rows(header: CacheHeader, rows: Sequence[CachedRow]) -> bytes:
    """Write rows as a safetensors file."""
    packed = [_pack_row(header, row) for row in rows]
    return save({name: np.concatenate([row[name] for row in packed]) for name in packed[0]})


def shard_name(index: int) -> str:
    """Return the name of a shard; names count from 1: `--shard 3/30` of a cache of 30 makes shard-00003.

    >>> shard_name(2)
    'shard-00003'
    """
    return f"shard-{index + 1:05d}"


# Writing


class CacheWriter:
    """Writer of a cache folder; complete shards of an earlier run are kept."""

    def __init__(self, folder: Path, header: CacheHeader) -> None:
        """Write the header, or check that the existing one is the same.

        BadArtifact where the folder holds another cache, FileProblem where it holds something else or cannot be
        written.
        """
        self.folder, self.header = folder, header
        if not (folder / HEADER_FILE).is_file():
            if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
                fix = "give a new or an empty folder as `output`"
                raise FileProblem(folder, "it is not empty, and holds no teacher cache", fix)
            write_json(folder / HEADER_FILE, header.written())
        elif differences := read_header(folder).differences(header):
            if any(folder.glob("*.safetensors")):
                problem = f"it holds another cache: {'; '.join(differences)}"
                raise BadArtifact(folder, problem, "give another `output`, or the settings of the one there")
            # no row was written of the one that is there
            write_json(folder / HEADER_FILE, header.written())

    def state(self, index: int) -> Literal["missing", "whole", "damaged"]:
        """Return the state of a shard; the whole file is read to verify it."""
        if not _note_file(self.folder, index).is_file():
            return "missing"
        try:
            check_content(self.folder, self.header, index, read_note(self.folder, self.header, index))
        except BadArtifact:
            return "damaged"
        return "whole"

    def write(self, index: int, rows: Sequence[CachedRow], *, device: str | None = None) -> ShardNote:
        """Write a shard and then its note, each atomically. FileProblem where they cannot be written."""
        self._remove_leftovers(index)
        content = pack_rows(self.header, rows)
        note = ShardNote(
            digest=self.header.digest,
            sha256=hashlib.sha256(content).hexdigest(),
            size=len(content),
            rows=len(rows),
            first_row=rows[0].number,
            positions=sum(len(row.token_logprobs) for row in rows),
            provenance=dict(provenance(device=device)),
        )
        write_whole(_data_file(self.folder, index), content)
        write_json(_note_file(self.folder, index), note.model_dump())
        return note

    def _remove_leftovers(self, index: int) -> None:
        """Remove what a killed process left of a shard; the note first, so that no note is without its shard."""
        _note_file(self.folder, index).unlink(missing_ok=True)
        for stale in self.folder.glob(f".{shard_name(index)}.*"):
            stale.unlink(missing_ok=True)


def _data_file(folder: Path, index: int) -> Path:
    return folder / f"{shard_name(index)}.safetensors"


def _note_file(folder: Path, index: int) -> Path:
    return folder / f"{shard_name(index)}.json"


# Reading


def read_header(folder: Path) -> CacheHeader:
    """Read a cache's header. Raises FileProblem where there is none, BadArtifact where it cannot be used."""
    path = folder / HEADER_FILE
    if not path.is_file():
        raise FileProblem(folder, "there is no teacher cache here", "make one with `write_cache`")
    return validated(CacheHeader, path, FORMAT.read(path), FORMAT.again)


def read_note(folder: Path, header: CacheHeader, index: int) -> ShardNote:
    """Read the note of a shard; BadArtifact where it is damaged, or of another cache."""
    path, again = _note_file(folder, index), _make_again(folder, header, index)
    note = validated(ShardNote, path, read_json(path, again), again)
    if note.digest != header.digest:
        raise BadArtifact(path, f"this shard is of another cache than {HEADER_FILE}", again)
    return note


def check_content(folder: Path, header: CacheHeader, index: int, note: ShardNote) -> None:
    """Raise BadArtifact where the sha256 of a shard differs from its note; the whole file is read."""
    note.file.check(_data_file(folder, index), _make_again(folder, header, index))


def _make_again(folder: Path, header: CacheHeader, index: int) -> str:
    return f"make it with `{header.call(folder, f'{index + 1}/{header.shards}')}`"


class Shard:
    """One memory-mapped shard; rows are read on demand."""

    def __init__(self, path: Path, header: CacheHeader) -> None:
        self.header = header
        self.file = cast("Any", safe_open(path, framework="numpy"))
        self.names = [name for name in self.file.keys() if name not in _PER_ROW]  # noqa: SIM118
        self.numbers, self.lengths, self.first = (self.file.get_tensor(name) for name in _PER_ROW[:3])
        positions = np.maximum(self.lengths - 1 - self.first, 0)
        token_bytes = -(-self.lengths.astype(np.int64) * id_bits(header.vocab) // 8)
        self.position_ends, self.token_ends = positions.cumsum(), token_bytes.cumsum()
        self.positions, self.token_bytes = positions, token_bytes

    def find(self, number: int) -> int | None:
        """Return the index of a row in the shard by its number; None if it is not there."""
        at = int(np.searchsorted(self.numbers, number))
        return at if at < len(self.numbers) and self.numbers[at] == number else None

    def token_ids(self, at: int) -> Int32[np.ndarray, " time_t"]:
        end, length = int(self.token_ends[at]), int(self.lengths[at])
        packed = self._part("tokens", end - int(self.token_bytes[at]), end)
        return np.asarray(unpack(packed[None], length, id_bits(self.header.vocab))[0])

    def row(self, at: int) -> CachedRow:
        end = int(self.position_ends[at])
        begin = end - int(self.positions[at])
        arrays = {name: self._part(name, begin, end) for name in self.names}
        ids, logprobs = unpack_candidates(self.header, arrays)
        return CachedRow(
            number=int(self.numbers[at]),
            token_ids=self.token_ids(at),
            first=int(self.first[at]),
            ids=ids,
            logprobs=logprobs,
            token_logprobs=arrays["token_logprobs"].astype(np.float32),
        )

    def _part(self, name: str, begin: int, end: int) -> np.ndarray:
        part = self.file.get_slice(name)
        if begin < end:
            return np.asarray(part[begin:end])
        # safetensors rejects an empty slice at the end of an array.
        kind = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}[part.get_dtype()]
        return np.zeros((0, *part.get_shape()[1:]), kind)


class TeacherCache:
    """Reader of a complete cache. Shards are memory-mapped; recently used shards and rows are cached in memory.

    Opening checks that all shards exist and have their sizes. The sha256 of a shard is checked once, when one of its
    rows is first read, or in `verify`.
    """

    def __init__(self, folder: Path, header: CacheHeader, notes: Sequence[ShardNote]) -> None:
        """Initialise from a header and notes; use `open`."""
        self.folder, self.header, self.notes = folder, header, tuple(notes)
        self._first_rows = [note.first_row for note in notes]
        self._verified: set[int] = set()
        self._shard = lru_cache(OPEN_SHARDS)(self._opened)
        self._row = lru_cache(DECODED_ROWS)(self._decoded)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        view: TokenizerView | None = None,
        *,
        data_fingerprint: str | None = None,
        template_fingerprint: str | None = None,
    ) -> TeacherCache:
        """Open a cache; check that it was made for the given tokenizer, data and template, if any.

        FileProblem where there is none. BadArtifact where a shard is missing or damaged, and says which call
        makes it; or where data or template differ. TokenizerMismatch.
        """
        folder = Path(folder)
        header = read_header(folder)
        if view is not None and view.fingerprint != header.tokenizer_fingerprint:
            built_for = (header.tokenizer, header.tokenizer_fingerprint)
            fix = f"give the teacher of the cache, {header.model}, or make another cache with `write_cache`"
            raise TokenizerMismatch(
                f"the cache {folder}", "teacher", built_for, (view.name, view.fingerprint), fix
            )
        for what, given in (("data", data_fingerprint), ("template", template_fingerprint)):
            there = getattr(header, f"{what}_fingerprint")
            if given not in (None, there):
                made_of = f"{getattr(header, what)} ({there[:8]}…)"
                problem = f"its {what} is {made_of}, not the one given ({str(given)[:8]}…)"
                fix = f"give the same {what}, or make another cache with `write_cache`"
                raise BadArtifact(folder, problem, fix)
        _check_complete(folder, header)
        notes = [read_note(folder, header, index) for index in range(header.shards)]
        for index, note in enumerate(notes):
            note.file.check_size(_data_file(folder, index), _make_again(folder, header, index))
        return cls(folder, header, notes)

    @property
    def k(self) -> int:
        return self.header.k

    @property
    def is_whole(self) -> bool:
        """Whether a position has all ids, in their own order, not the likeliest."""
        return self.header.encoding == "whole"

    @property
    def positions(self) -> int:
        """Number of cached positions, one for each predicted token."""
        return sum(note.positions for note in self.notes)

    @property
    def size(self) -> int:
        """Size of all files in bytes."""
        return folder_size(self.folder, range(self.header.shards))

    def row(self, number: int) -> CachedRow:
        """Read the teacher signal of a row, by its number in the data file. BadArtifact where there is no such row."""
        return self._row(number)

    def token_ids(self, number: int) -> Int32[np.ndarray, " time_t"]:
        """Read only the token ids of a row."""
        shard, at = self._locate(number)
        return shard.token_ids(at)

    def numbers(self) -> Iterator[int]:
        """Give the numbers of all rows, in order."""
        for index in range(len(self.notes)):
            yield from self._shard(index).numbers.tolist()

    def verify(self, on_shard: Callable[[int], None] = lambda _done: None) -> None:
        """Check the sha256 of every shard. BadArtifact for the first that differs from its note."""
        for index in range(len(self.notes)):
            self._check(index)
            on_shard(index + 1)

    def _check(self, index: int) -> None:
        if index not in self._verified:
            check_content(self.folder, self.header, index, self.notes[index])
            self._verified.add(index)

    def _opened(self, index: int) -> Shard:
        self._check(index)
        path = _data_file(self.folder, index)
        try:
            return Shard(path, self.header)
        except (SafetensorError, KeyError) as error:
            fix = _make_again(self.folder, self.header, index)
            raise BadArtifact(path, f"it is no shard of a cache ({error})", fix) from None

    def _locate(self, number: int) -> tuple[Shard, int]:
        index = bisect_right(self._first_rows, number) - 1
        shard = self._shard(index) if index >= 0 else None
        if shard is None or (at := shard.find(number)) is None:
            fix = "give the data that it was made of, or make another with `write_cache`"
            raise BadArtifact(self.folder, f"it has no row {number}, but {self.header.rows:,} others", fix)
        return shard, at

    def _decoded(self, number: int) -> CachedRow:
        shard, at = self._locate(number)
        return shard.row(at)


def folder_size(folder: Path, shards: Iterable[int]) -> int:
    """Size in bytes of a cache's header and of the existing ones of some shards, with their notes."""
    files = [folder / HEADER_FILE]
    for index in shards:
        files += [_data_file(folder, index), _note_file(folder, index)]
    return sum(path.stat().st_size for path in files if path.is_file())


def missing_shards(folder: Path, header: CacheHeader) -> list[int]:
    """List the shards without a note: missing or unfinished."""
    return [index for index in range(header.shards) if not _note_file(folder, index).is_file()]


def _check_complete(folder: Path, header: CacheHeader) -> None:
    missing = missing_shards(folder, header)
    if not missing:
        return
    names = ", ".join(shard_name(index) for index in missing[:3]) + (", …" if len(missing) > 3 else "")
    one = f"{missing[0] + 1}/{header.shards}" if len(missing) == 1 else None
    problem = f"{len(missing)} of {header.shards} shards are missing ({names})"
    raise BadArtifact(folder, problem, f"make them with `{header.call(folder, one)}`")
