"""A teacher cache that is filled while it is used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.artifacts.read_through_cache import ROWS_IN_MEMORY, ReadThroughCache
from cdm_toolkit.artifacts.teacher_cache import CachedRow, TeacherCache
from cdm_toolkit.artifacts.teacher_header import CacheHeader
from cdm_toolkit.errors import BadArtifact

K, ROWS = 4, 10


def header(**changed: Any) -> CacheHeader:
    named = dict.fromkeys(("model_fingerprint", "tokenizer_fingerprint", "data_fingerprint"), "x" * 64)
    facts = {
        "model": "t",
        "teacher_dtype": "served",
        "tokenizer": "t",
        "vocab": 50,
        "data": "d",
        "rows": ROWS,
    }
    facts |= {"limit": None, "template": "none", "template_fingerprint": "x" * 64, "k": K, "dtype": "float32"}
    facts |= {"quantised": False, "max_length": 64, "rows_per_shard": 4, "provenance": dict(provenance())}
    return CacheHeader(**named | facts | changed)  # type: ignore[arg-type]


def row(number: int) -> CachedRow:
    generator = np.random.default_rng(number)
    ids = generator.permutation(50)[: 3 + number].astype(np.int32)
    positions = len(ids) - 2
    top = np.stack([generator.permutation(50)[:K] for _ in range(positions)]).astype(np.int32)
    logprobs = -np.sort(generator.random((positions, K)).astype(np.float32), axis=1)
    return CachedRow(number, ids, 1, top, logprobs, generator.random(positions).astype(np.float32))


def same(found: CachedRow | None, wanted: CachedRow) -> bool:
    names = ("number", "token_ids", "first", "ids", "logprobs", "token_logprobs")
    return found is not None and all(
        np.array_equal(getattr(found, name), getattr(wanted, name)) for name in names
    )


def test_rows_come_in_any_order_from_several_processes(tmp_path: Path) -> None:
    one, other = ReadThroughCache(tmp_path, header()), ReadThroughCache(tmp_path, header())
    for number in (7, 2, 9):
        one.put(row(number))
    assert same(one.row(7), row(7)), "also before it is written"
    assert other.row(7) is None
    one.flush()
    assert same(other.row(7), row(7))
    other.put(row(4))
    other.flush()
    assert all(same(ReadThroughCache(tmp_path, header()).row(number), row(number)) for number in (2, 4, 7, 9))


def test_it_becomes_a_cache_when_all_is_there(tmp_path: Path) -> None:
    cache, needed = ReadThroughCache(tmp_path, header()), [1, 2, 3, 5, 6, 7, 8, 9]
    for number in needed[:-1]:
        cache.put(row(number))
    assert not cache.finish(range(1, ROWS + 1), needed), "9 is missing"
    cache.put(row(9))
    assert cache.finish(range(1, ROWS + 1), needed)
    whole = TeacherCache.open(tmp_path)
    whole.verify()
    assert all(same(whole.row(number), row(number)) for number in needed)
    assert len(whole.row(4).token_ids) == len(whole.row(10).token_ids) == 0, "nobody needs them"
    assert not list(tmp_path.glob("part-*"))
    assert same(ReadThroughCache(tmp_path, header()).row(3), row(3))


def test_what_is_damaged_is_not_read(tmp_path: Path) -> None:
    cache = ReadThroughCache(tmp_path, header())
    for number in (1, 2):
        cache.put(row(number))
        cache.flush()
    first = min(tmp_path.glob("part-*"), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(first.read_bytes())
    content[-3] ^= 1
    first.write_bytes(content)
    again = ReadThroughCache(tmp_path, header())
    assert again.row(1) is None
    assert same(again.row(2), row(2))


def test_it_is_written_now_and_then(tmp_path: Path) -> None:
    cache = ReadThroughCache(tmp_path, header(rows=ROWS_IN_MEMORY))
    for number in range(1, ROWS_IN_MEMORY):
        cache.put(replace(row(5), number=number))
    assert not list(tmp_path.glob("part-*"))
    cache.put(replace(row(5), number=ROWS_IN_MEMORY))
    assert len(list(tmp_path.glob("part-*"))) == 1


def test_another_cache_is_refused(tmp_path: Path) -> None:
    first = ReadThroughCache(tmp_path, header())
    first.put(row(1))
    first.flush()
    with pytest.raises(BadArtifact, match=r"it holds another cache: .*`k`"):
        ReadThroughCache(tmp_path, header(k=5))
