"""Between DistillKit's sets and our teacher caches, both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml

from cdm_toolkit.artifacts.atomic import atomic_folder, atomic_write, write_whole
from cdm_toolkit.artifacts.code_fingerprint import code_fingerprint
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.artifacts.teacher_cache import CachedRow, CacheWriter, TeacherCache
from cdm_toolkit.artifacts.teacher_header import FORMAT, ROWS_PER_SHARD, CacheHeader
from cdm_toolkit.errors import BadArtifact, BadOption, BadRow, MissingExtra, NothingToTrain
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.integrations.distillkit import IDS, LABELS, DistillKitSet, SetFiles
from cdm_toolkit.integrations.distillkit_format import CONFIG_FILE, Quantised, read_compression
from cdm_toolkit.kd.given_ids import row_of_chat_ids
from cdm_toolkit.kd.rows import Row, row_of, rows_fingerprint
from cdm_toolkit.kd.tokenized_rows import TokenizerSide, template_fingerprint, tokenizer_side

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Bool

    from cdm_toolkit.tokdiff.view import TokenizerView

ROWS_FILE = "rows.jsonl"
"""The texts of a cache that was made of a set, with the ids that its teacher has read."""
ROWS_PER_FILE = 256
NOT_LEARNED = -100
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written. `rows` and `positions` are those with candidates; `size` is in bytes."""

    folder: Path
    rows: int
    positions: int
    k: int
    size: int


# A set to a cache


def cache_from_set(
    files: SetFiles,
    output: Path,
    *,
    tokenizer: str,
    dtype: Literal["float16", "float32"] = "float32",
    quantised: bool = False,
    on_progress: OnProgress = lambda _done, _total: None,
) -> Converted:
    """Write a set of DistillKit's as a teacher cache, with the rows to train on in its `rows.jsonl`.

    Raises as `DistillKitSet`, BadRow for a chat of which some answers alone are learned, NothingToTrain, and what
    CacheWriter raises.
    """
    loaded = load_tokenizer(tokenizer)
    side = tokenizer_side(loaded.tokenizer, loaded.view)
    found = DistillKitSet(files, side.view)
    facts = _Facts.of(found)
    writer = CacheWriter(output, _header(found, side, facts, output, dtype=None if quantised else dtype))
    rows, positions, done = iter(found.rows), 0, 0
    with atomic_write(output / ROWS_FILE) as file:
        for index in range(writer.header.shards):
            some = list(islice(rows, ROWS_PER_SHARD))
            file.write("".join(f"{_line(files.path, row)}\n" for row in some).encode())
            positions += writer.write(index, [_cached(found, row) for row in some]).positions
            done += len(some)
            on_progress(done, facts.rows)
    return Converted(output, facts.with_text, positions, found.k, TeacherCache.open(output).size)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What one pass over the texts of a set tells; `longest` is in tokens."""

    rows: int
    with_text: int
    longest: int
    template: Literal["none", "chat"]
    fingerprint: str

    @classmethod
    def of(cls, found: DistillKitSet) -> _Facts:
        rows, longest, chats = 0, 0, [0, 0]

        def read() -> Iterator[Row]:
            nonlocal rows, longest
            for rows, row in enumerate(found.rows, 1):
                if row.given is not None:
                    longest = max(longest, len(row.given.ids))
                    chats[bool(row.messages)] += 1
                yield row_of(rows, json.loads(_line(found.rows.name, row)))

        fingerprint = rows_fingerprint(read())
        if not longest:
            raise NothingToTrain(found.folder, f"{rows} rows, none with a text to learn")
        if all(chats):
            fix = "train on the set itself: a teacher of kind distillkit"
            problem = f"it has {chats[1]} chats and {chats[0]} other texts, which no one template writes"
            raise BadArtifact(found.folder, problem, fix)
        return cls(rows, sum(chats), longest, "chat" if chats[1] else "none", fingerprint)


def _line(name: str, row: Row) -> str:
    """Write a row as a line of a data file."""
    return json.dumps(_record(name, row), ensure_ascii=False)


def _record(name: str, row: Row) -> Mapping[str, Any]:
    if row.given is None:
        return {"text": ""}
    around = {"given": row.given.as_dict(), "ended": row.ended}
    if not row.messages:
        return {"text": row.text, **around}
    if len(row.learned) != sum(message.is_answer for message in row.messages):
        fix = "train on the set itself: a teacher of kind distillkit"
        raise BadRow(name, row.number, "of its answers some alone are learned, which no data file says", fix)
    return {"messages": row.chat, **around}


def _header(
    found: DistillKitSet,
    side: TokenizerSide,
    facts: _Facts,
    output: Path,
    *,
    dtype: Literal["float16", "float32"] | None,
) -> CacheHeader:
    source = hashlib.sha256(f"{found.compression!r} {found.rows.table._fingerprint}".encode()).hexdigest()
    named = {"model": source, "tokenizer": side.view.fingerprint, "data": facts.fingerprint}
    return CacheHeader(
        code=code_fingerprint(*FORMAT.code),
        model=found.rows.name,
        model_fingerprint=source,
        teacher_dtype="that of the set",
        tokenizer=side.view.name,
        tokenizer_fingerprint=side.view.fingerprint,
        vocab=side.view.vocab_size,
        data=str(output / ROWS_FILE),
        data_fingerprint=facts.fingerprint,
        rows=facts.rows,
        limit=None,
        template=facts.template,
        template_fingerprint=template_fingerprint(side, facts.template),
        k=found.k,
        dtype=dtype or "float16",
        quantised=dtype is None,
        max_length=max(facts.longest, 4),
        rows_per_shard=ROWS_PER_SHARD,
        provenance=dict(provenance(fingerprints=named)),
    )


def _cached(found: DistillKitSet, row: Row) -> CachedRow:
    """Look up what is learned of a row."""
    if row.given is None:
        none = np.empty((0, found.k), np.float32)
        return CachedRow(row.number, np.empty(0, np.int32), 0, none.astype(np.int32), none, none.sum(1))
    whole = found.row(row.number)
    first, ids = row.given.turns[0][0] - 1, np.array(row.given.ids, np.int32)
    part = slice(first - whole.first, len(ids) - 1 - whole.first)
    return CachedRow(
        row.number, ids, first, whole.ids[part], whole.logprobs[part], whole.token_logprobs[part]
    )


# A cache to a set


def set_from_cache(
    cache: TeacherCache,
    output: Path,
    *,
    compression: Path | None = None,
    k: int | None = None,
    on_progress: OnProgress = lambda _done, _total: None,
) -> Converted:
    """Write a cache as a set of DistillKit's: parquet files and `compression_config.yaml`.

    Candidates are kept as they are, in float32, unless a file says how to compress them. What a cache does not have are
    the positions before the completion; `labels` mark them as not learned, and so what others than the assistant say in
    a chat. Rows without a completion are left out. Raises OutputExists, MissingExtra, BadOption for a `k` that the
    cache has not; for a cache of chats what loading its tokenizer raises, and TokenizerMismatch.
    """
    way = _way(cache, compression, k)
    view = None
    if cache.header.template == "chat":
        view = load_tokenizer(cache.header.tokenizer).view
        cache = TeacherCache.open(cache.folder, view)
    rows = (row for number in cache.numbers() if len((row := cache.row(number)).logprobs))
    count, positions = 0, 0
    with atomic_folder(output) as making:
        while some := list(islice(rows, ROWS_PER_FILE)):
            _write(
                making / f"data_{count // ROWS_PER_FILE}.parquet",
                [_written(way, cache, row, view) for row in some],
            )
            count, positions = count + len(some), positions + sum(len(row.logprobs) for row in some)
            on_progress(some[-1].number, cache.header.rows)
        settings = way.model_dump(mode="json")
        write_whole(making / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False).encode())
        size = sum(file.stat().st_size for file in making.iterdir())
    return Converted(output, count, positions, way.k, size)


def _way(cache: TeacherCache, file: Path | None, k: int | None) -> Quantised:
    vocab = cache.header.vocab
    if file is None:
        kept = k or (100 if cache.is_whole else cache.k)
        way = Quantised(d=vocab, k=kept, exact_k=kept, residual_bins=(), delta_encoding=False)
    else:
        found = read_compression(file)
        if not isinstance(found, Quantised):
            allowed = f"a {CONFIG_FILE} with logprob_compressor: the older form is only read"
            raise BadOption("compression", str(file), allowed)
        way = found
    if way.k > cache.k:
        raise BadOption("k", way.k, f"at most {cache.k}: {cache.folder} has no more")
    if way.d < vocab:
        raise BadOption("d", way.d, f"at least {vocab}, the ids of {cache.header.tokenizer}")
    return way


def _written(
    way: Quantised, cache: TeacherCache, row: CachedRow, view: TokenizerView | None
) -> dict[str, Any]:
    """Make a record of a row: the positions before the completion have candidates that nobody reads."""
    ids, logprobs = row.ids[:, : way.k], row.logprobs[:, : way.k]
    if cache.is_whole:
        best = np.argsort(-row.logprobs, axis=1, kind="stable")[:, : way.k]
        ids, logprobs = best.astype(np.int32), np.take_along_axis(row.logprobs, best, 1)
    labels = np.where(_learned(row, view), row.token_ids.astype(np.int64), NOT_LEARNED)
    columns = way.encode(ids, logprobs)
    blank = {name: np.zeros((row.first, column.shape[1]), np.uint8) for name, column in columns.items()}
    lists = {name: np.concatenate((blank[name], column)) for name, column in columns.items()}
    return {IDS: row.token_ids.astype(np.uint64), LABELS: labels, **lists}


def _learned(row: CachedRow, view: TokenizerView | None) -> Bool[np.ndarray, " time_t"]:
    """Mark the tokens that are learned: all after the prompt, or the answers of a chat, whose tokenizer is given."""
    at = np.arange(len(row.token_ids))
    learned = at > row.first
    chat = None if view is None else row_of_chat_ids(row.number, view, row.token_ids, learned)
    if chat is not None and chat.given is not None:
        learned &= np.any([(at >= first) & (at < end) for first, end in chat.given.turns], axis=0)
    return learned


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra("pyarrow", "export", "writing a set of DistillKit's") from None
    numbers = {IDS: pa.uint64(), LABELS: pa.int64()}
    columns = {
        name: pa.array([record[name] for record in records], pa.list_(numbers[name]))
        if name in numbers
        else _nested([record[name] for record in records])
        for name in records[0]
    }
    parquet.write_table(pa.table(columns), file)


def _nested(matrices: list[np.ndarray]) -> pa.Array:
    """Lay matrices out as lists of lists of bytes."""
    import pyarrow as pa

    rows = np.concatenate(matrices)
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]), pa.array(rows.reshape(-1))
    )
    ends = np.cumsum([0, *map(len, matrices)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), inner)
