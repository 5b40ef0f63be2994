"""Teacher caches on disk: what comes back, what it costs, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.artifacts import atomic
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.artifacts.teacher_cache import CachedRow, CacheWriter, TeacherCache
from cdm_toolkit.artifacts.teacher_header import CacheHeader
from cdm_toolkit.artifacts.teacher_packing import (
    HEAD,
    id_bits,
    log_rest,
    pack,
    pack_set,
    quantise,
    restore,
    unpack,
    unpack_set,
    with_rest,
)
from cdm_toolkit.artifacts.teacher_packing_reference import pack_one, pack_set_one, quantise_one
from cdm_toolkit.errors import BadArtifact, FileProblem, TokenizerMismatch

VOCAB = 1000


def header(**changed: Any) -> CacheHeader:
    facts: dict[str, Any] = {
        "model": "teacher",
        "model_fingerprint": "m" * 64,
        "teacher_dtype": "float32",
        "tokenizer": "teacher",
        "tokenizer_fingerprint": "t" * 64,
        "vocab": VOCAB,
        "data": "rows.jsonl",
        "data_fingerprint": "d" * 64,
        "rows": 10,
        "limit": None,
        "template": "none",
        "template_fingerprint": "n" * 64,
        "k": 20,
        "dtype": "float16",
        "quantised": False,
        "max_length": 512,
        "rows_per_shard": 4,
        "provenance": dict(provenance(["cdm", "teacher", "cache"])),
    }
    return CacheHeader(**facts | changed)


def distributions(positions: int, vocab: int, k: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Give the top k of distributions that are as peaked as a language model's."""
    generator = np.random.default_rng(seed)
    logits = 2.5 * generator.standard_normal((positions, vocab)) + 4 * generator.standard_normal(
        (positions, 1)
    )
    logits[:, 0] += generator.uniform(0, 15, positions)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    ids = np.argsort(-logprobs, axis=1)[:, :k].astype(np.int32)
    return ids, np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)


def cached_rows(made: CacheHeader, numbers: list[int], *, length: int = 9) -> list[CachedRow]:
    rows = []
    for number in numbers:
        generator = np.random.default_rng(number)
        time_t = length + number % 5
        first = number % 4
        positions = time_t - 1 - first
        ids, logprobs = distributions(positions, made.vocab, made.k, seed=number)
        if made.encoding == "whole":
            order = np.argsort(ids, axis=1)
            ids, logprobs = (np.take_along_axis(array, order, axis=1) for array in (ids, logprobs))
        token_ids = generator.integers(0, made.vocab, time_t).astype(np.int32)
        rows.append(CachedRow(number, token_ids, first, ids, logprobs, logprobs[:, -1].copy()))
    return rows


NUMBERS = [1, 2, 3, 5, 6, 7, 8, 9, 11, 12]  # lines 4 and 10 are blank


def filled(folder: Path, made: CacheHeader) -> list[CachedRow]:
    rows = cached_rows(made, NUMBERS[: made.rows])
    writer = CacheWriter(folder, made)
    for index in range(made.shards):
        size = made.rows_per_shard
        writer.write(index, rows[index * size : (index + 1) * size])
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    filled(tmp_path / "cache", header())
    return tmp_path / "cache"


# Packing


@st.composite
def sets_of_ids(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Draw positions of different ascending ids, and the size of their vocabulary."""
    vocab = draw(st.sampled_from([1, 2, 9, 300, 32_000, 128_256, 2**18]))
    count = draw(st.integers(0, min(vocab, 70)))
    seed, positions = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 4))
    generator = np.random.default_rng(seed)
    drawn = [np.sort(generator.choice(vocab, count, replace=False)) for _ in range(positions)]
    return np.array(drawn, np.int32).reshape(positions, count), vocab


@given(sets_of_ids())
def test_ids_come_back_and_the_twin_writes_the_same_bytes(drawn: tuple[np.ndarray, int]) -> None:
    ids, vocab = drawn
    packed, as_set = pack(ids, id_bits(vocab)), pack_set(ids, vocab)
    assert (unpack(packed, ids.shape[1], id_bits(vocab)) == ids).all()
    assert (unpack_set(as_set, ids.shape[1], vocab) == ids).all()
    for position in range(len(ids)):
        assert packed[position].tobytes() == pack_one(ids[position].tolist(), id_bits(vocab))
        assert as_set[position].tobytes() == pack_set_one(ids[position].tolist(), vocab)


def test_the_first_and_the_last_ids_of_a_vocabulary() -> None:
    for vocab in (64, 65, 2**17, 2**18):
        ids = np.stack([np.arange(64), np.arange(vocab - 64, vocab)])
        assert (unpack_set(pack_set(ids, vocab), 64, vocab) == ids).all()
        assert (unpack(pack(ids, id_bits(vocab)), 64, id_bits(vocab)) == ids).all()


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 70),
    st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    st.booleans(),
)
def test_levels_are_those_of_the_twin(seed: int, k: int, spread: float, whole: bool) -> None:
    generator = np.random.default_rng(seed)
    logits = spread * generator.standard_normal((3, k if whole else 200))
    logprobs = np.sort(logits - np.logaddexp.reduce(logits, axis=1)[:, None], axis=1)[:, ::-1][:, :k]
    restored = restore(quantise(logprobs))
    for position in range(3):
        twin = quantise_one(logprobs[position].tolist())
        # float16 keeps the masses of tail and rest: 11 bits of a logarithm
        assert np.allclose(np.exp(restored[position]), np.exp(twin), rtol=0.02, atol=1e-6)
    exact = np.exp(logprobs.astype(np.float64)).sum(1)
    assert np.allclose(np.exp(restored.astype(np.float64)).sum(1), exact, rtol=0.02, atol=1e-6)


def test_the_bytes_of_the_format() -> None:
    """What old caches hold: where this changes, VERSION must."""
    ids = np.array([[3, 5, 130, 131, 999]])
    assert pack(ids, 10).tobytes().hex() == "00c0520883f9c0"
    assert pack_set(ids, 1000).tobytes().hex() == "0614103cfb02"
    levels = quantise(np.array([[-1.5 - 0.5 * rank for rank in range(10)]]))
    assert levels.head.tolist() == [[0, 36, 73, 109, 146, 182, 219, 255]]
    assert levels.tail.tolist() == [[0, 7]]
    assert levels.ranges.tolist() == [[56, 8]]


def test_rounding_moves_nothing_into_the_rest() -> None:
    _, logprobs = distributions(500, 5000, 64)
    rest = 1 - np.exp(logprobs.astype(np.float64)).sum(1)
    for found in (restore(quantise(logprobs)), with_rest(logprobs.astype(np.float16), log_rest(logprobs))):
        left = 1 - np.exp(found.astype(np.float64)).sum(1)
        assert np.allclose(left, rest, rtol=0.01, atol=1e-6)


def test_impossible_candidates_stay_impossible() -> None:
    logprobs = np.full((1, 12), -np.inf, np.float32)
    logprobs[0, :2] = np.log([0.75, 0.25])
    restored = np.exp(restore(quantise(logprobs)))
    assert np.allclose(restored[0, :2], [0.75, 0.25], atol=0.005)
    assert restored[0, 2:].max() < 1e-6


# Round trips through files

ENCODINGS = {
    "float32": {"dtype": "float32"},
    "float16": {},
    "quantised": {"quantised": True},
    "whole": {"k": VOCAB, "dtype": "float32"},
    "fewer than the head": {"k": HEAD - 3, "quantised": True},
    "the head alone": {"k": HEAD, "quantised": True},
    "one": {"k": 1},
}


@pytest.mark.parametrize("settings", ENCODINGS.values(), ids=ENCODINGS)
def test_rows_come_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = header(**settings)
    written = filled(tmp_path / "cache", made)
    cache = TeacherCache.open(tmp_path / "cache")
    assert cache.header == made
    assert cache.positions == sum(len(row.token_logprobs) for row in written)
    for row in reversed(written):
        found = cache.row(row.number)
        assert (found.number, found.first) == (row.number, row.first)
        assert np.array_equal(found.token_ids, row.token_ids)
        assert np.array_equal(cache.token_ids(row.number), row.token_ids)
        assert found.logprobs.shape == (len(row.token_logprobs), made.k)
        assert found.ids.dtype == np.int32
        assert {a.dtype for a in (found.logprobs, found.token_logprobs)} == {np.dtype(np.float32)}
        if made.dtype == "float32":
            assert np.array_equal(found.ids, row.ids)
            assert np.array_equal(found.logprobs, row.logprobs)
            assert np.array_equal(found.token_logprobs, row.token_logprobs)
            continue
        assert np.allclose(found.token_logprobs, row.token_logprobs, rtol=1e-3)
        assert np.array_equal(np.sort(found.ids), np.sort(row.ids))
        assert (np.diff(found.logprobs, axis=1) <= 0).all()
        if not made.quantised:
            assert np.array_equal(found.ids, row.ids)
        in_order, expected = np.argsort(found.ids, axis=1), np.argsort(row.ids, axis=1)
        near = np.take_along_axis(found.logprobs, in_order, axis=1)
        exact = np.take_along_axis(row.logprobs, expected, axis=1)
        assert np.abs(np.exp(near) - np.exp(exact)).max() < (0.02 if made.quantised else 2e-3)


def test_rows_of_which_nothing_is_cached(tmp_path: Path) -> None:
    made = header(rows=3, quantised=True)
    nothing = np.empty((0, made.k), np.float32)
    empty = [
        CachedRow(1, np.empty(0, np.int32), 0, nothing.astype(np.int32), nothing, nothing.sum(1)),
        *cached_rows(made, [2]),
        CachedRow(3, np.arange(5, dtype=np.int32), 4, nothing.astype(np.int32), nothing, nothing.sum(1)),
    ]
    CacheWriter(tmp_path / "cache", made).write(0, empty)
    cache = TeacherCache.open(tmp_path / "cache")
    for row in empty:
        found = cache.row(row.number)
        assert np.array_equal(found.token_ids, row.token_ids)
        assert found.ids.shape == found.logprobs.shape == row.ids.shape
        assert len(found.token_logprobs) == len(row.token_logprobs)


@pytest.mark.parametrize(
    ("vocab", "settings", "most"),
    [
        (128_256, {}, 300),
        (2**18, {}, 300),
        (49_152, {"quantised": True}, 150),
        (128_256, {"quantised": True}, 150),
    ],
)
def test_bytes_a_token(tmp_path: Path, vocab: int, settings: dict[str, Any], most: int) -> None:
    """A shard of 32 rows of 210 tokens, 140 of them predicted, as GSM8K has them."""
    made = header(vocab=vocab, k=64, rows=32, rows_per_shard=32, **settings)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(1, 33):
        ids = np.stack([generator.choice(vocab, 64, replace=False) for _ in range(140)]).astype(np.int32)
        logprobs = np.sort(generator.uniform(-12, -5, (140, 64)).astype(np.float32))[:, ::-1]
        token_ids = generator.integers(0, vocab, 210).astype(np.int32)
        rows.append(CachedRow(number, token_ids, 69, ids, logprobs, logprobs[:, 0]))
    CacheWriter(tmp_path / "cache", made).write(0, rows)
    cache = TeacherCache.open(tmp_path / "cache")
    assert cache.positions == 32 * 140
    assert cache.size / cache.positions <= most
    assert np.array_equal(np.sort(cache.row(32).ids), np.sort(rows[31].ids))


# Refusals


def refusal(folder: Path, number: int = 1, **options: Any) -> str:
    """Give the line with which opening a cache and reading a row is refused."""
    with pytest.raises(BadArtifact) as caught:
        TeacherCache.open(folder, **options).row(number)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    shard = folder / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    said = refusal(folder)
    assert "shard-00002.safetensors: it is damaged" in said
    assert "shard='2/3'" in said


def test_an_altered_shard_is_named_when_it_is_read(folder: Path) -> None:
    shard = folder / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    cache = TeacherCache.open(folder)
    cache.row(1)
    with pytest.raises(BadArtifact, match=r"shard-00002.safetensors: it is damaged: its sha256"):
        cache.row(NUMBERS[4])
    with pytest.raises(BadArtifact, match="shard-00002"):
        TeacherCache.open(folder).verify()


def test_a_missing_shard_is_named_with_its_call(folder: Path) -> None:
    for suffix in ("safetensors", "json"):
        (folder / f"shard-00003.{suffix}").unlink()
        said = refusal(folder)
        assert "shard-00003" in said
        assert f"`write_cache(CacheSettings(model='teacher', data='rows.jsonl', output='{folder}'" in said
        assert "shard='3/3'))`" in said


def test_a_shard_of_another_cache_is_named(folder: Path, tmp_path: Path) -> None:
    filled(tmp_path / "other", header(model_fingerprint="o" * 64))
    for suffix in ("safetensors", "json"):
        shutil.copy(tmp_path / "other" / f"shard-00001.{suffix}", folder)
    assert "shard-00001.json: this shard is of another cache" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("cache.json", b"{", "is damaged"),
        ("cache.json", b"[1]", "this is no cdm-toolkit teacher cache"),
        ("cache.json", b"\xff\xfe", "is damaged"),
        ("shard-00001.json", b"{}", "is damaged"),
        ("shard-00001.json", b"not JSON", "is damaged"),
    ],
)
def test_damaged_descriptions(folder: Path, file: str, content: bytes, words: str) -> None:
    (folder / file).write_bytes(content)
    message = refusal(folder)
    assert file in message
    assert words in message


@pytest.mark.parametrize(("name", "value"), [("version", 3), ("k", "many"), ("form", "new")])
def test_a_header_that_this_version_does_not_know(folder: Path, name: str, value: Any) -> None:
    path = folder / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert name in refusal(folder)


def test_a_header_that_was_edited(folder: Path) -> None:
    path = folder / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"k": 19}))
    assert "of another cache" in refusal(folder)


def test_no_cache_and_no_such_row(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="there is no teacher cache here"):
        TeacherCache.open(tmp_path / "nothing")
    for number in (0, 4, 13):
        assert f"it has no row {number}" in refusal(folder, number)


def test_made_for_something_else(folder: Path, smollm2_view: Any) -> None:
    with pytest.raises(TokenizerMismatch, match="was built for teacher"):
        TeacherCache.open(folder, smollm2_view)
    assert "its data is rows.jsonl" in refusal(folder, data_fingerprint="x" * 64)
    assert "its template is none" in refusal(folder, template_fingerprint="x" * 64)
    TeacherCache.open(folder, data_fingerprint="d" * 64, template_fingerprint="n" * 64)


# Writing


def test_another_cache_in_the_same_folder_is_refused_with_the_difference(folder: Path) -> None:
    CacheWriter(folder, header(model="the same by another name", provenance=dict(provenance([]))))
    changes = {
        "`k` is 20 there and 10 now": {"k": 10},
        "the model is teacher (mmmmmmmm…) there and other (oooooooo…) now": {
            "model": "other",
            "model_fingerprint": "o" * 64,
        },
        "the data is rows.jsonl": {"data_fingerprint": "e" * 64},
        "`quantised` is False there and True now": {"quantised": True},
    }
    for words, change in changes.items():
        with pytest.raises(BadArtifact) as caught:
            CacheWriter(folder, header(**change))
        assert words in str(caught.value)


def test_a_header_without_shards_stands_in_nobodys_way(tmp_path: Path) -> None:
    CacheWriter(tmp_path, header())
    filled(tmp_path, header(k=10))
    assert TeacherCache.open(tmp_path).k == 10


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileProblem, match="it is not empty"):
        CacheWriter(tmp_path, header())


def test_state_of_shards_and_what_a_killed_process_leaves(folder: Path) -> None:
    writer = CacheWriter(folder, header())
    (folder / "shard-00001.json").unlink()
    (folder / ".shard-00001.safetensors-0123456789ab").write_bytes(b"half")
    damaged = folder / "shard-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert [writer.state(index) for index in range(3)] == ["missing", "damaged", "whole"]
    rows = cached_rows(header(), NUMBERS)
    for index in (0, 1):
        writer.write(index, rows[4 * index : 4 * index + 4])
    assert [writer.state(index) for index in range(3)] == ["whole"] * 3
    assert not list(folder.glob(".*"))


def test_folders_are_put_together_by_copying(folder: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    rows = cached_rows(header(), NUMBERS)
    for nth, part in enumerate(parts):
        writer = CacheWriter(part, header())
        for index in range(nth, 3, 2):
            writer.write(index, rows[4 * index : 4 * index + 4])
        with pytest.raises(BadArtifact, match="shards are missing"):
            TeacherCache.open(part)
    shutil.copytree(parts[1], parts[0], dirs_exist_ok=True)
    together, at_once = TeacherCache.open(parts[0]), TeacherCache.open(folder)
    assert [note.sha256 for note in together.notes] == [note.sha256 for note in at_once.notes]


def test_no_space_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CacheWriter(folder, header())

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(FileProblem, match="No space left"):
        writer.write(0, cached_rows(header(), NUMBERS[:4]))
    monkeypatch.undo()
    assert [writer.state(index) for index in range(3)] == ["missing", "whole", "whole"]
    assert not list(folder.glob(".*"))
