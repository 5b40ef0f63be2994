"""A set of DistillKit's teaches as a cache of the same numbers does, and is converted both ways."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdm_toolkit.artifacts.teacher_cache import TeacherCache
from cdm_toolkit.distill.plan import plan
from cdm_toolkit.distill.run import run
from cdm_toolkit.distill.settings import SourceConfig, from_mapping
from cdm_toolkit.distill.sources import Rows, read_rows
from cdm_toolkit.distill.write_teacher_cache import CacheSettings, write_cache
from cdm_toolkit.errors import (
    BadArtifact,
    BadOption,
    BadRow,
    BadSettings,
    FileProblem,
    NothingToTrain,
    OutputExists,
    TokenizerMismatch,
)
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.integrations.distillkit import DistillKitSet, SetFiles
from cdm_toolkit.integrations.distillkit_convert import cache_from_set, set_from_cache
from cdm_toolkit.integrations.distillkit_format import CONFIG_FILE
from cdm_toolkit.kd.tokenized_rows import tokenize_rows, tokenizer_side

from ..hub.hub_server import serve

K = 64


@pytest.fixture(autouse=True)
def own_caches(cache_in, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("CDM_CACHE", str(cache_in(tmp_path_factory.mktemp("own") / "cache")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="module")
def cached(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    settings = {"model": tiny.teacher, "data": tiny.data, "output": str(folder), "k": K, "dtype": "float32"}
    write_cache(CacheSettings.model_validate(settings))
    return folder


@pytest.fixture(scope="module")
def folder(cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the cache as a set."""
    made = tmp_path_factory.mktemp("sets") / "set"
    set_from_cache(TeacherCache.open(cached), made)
    return made


def view_of(tiny):
    return load_tokenizer(tiny.teacher).view


def settings_of_set(tiny, folder: Path, **teacher: Any) -> dict[str, Any]:
    return {
        "data": {"path": str(folder)},
        "teachers": [
            {"kind": "distillkit", "model": "big", "tokenizer": tiny.teacher, "top_k": 40, **teacher}
        ],
    }


def test_a_cache_that_was_written_as_a_set_has_its_numbers(tiny, cached: Path, folder: Path) -> None:
    cache, found = TeacherCache.open(cached), DistillKitSet(SetFiles(str(folder)), view_of(tiny))
    assert len(found.rows) == cache.header.rows
    known = []
    for row in read_rows(tiny.data):
        own, theirs = cache.row(row.number), found.row(row.number)
        assert np.array_equal(own.token_ids, theirs.token_ids)
        assert own.first == theirs.first
        for name in ("ids", "logprobs"):
            assert np.array_equal(getattr(own, name), getattr(theirs, name))
        is_known = (own.ids == own.token_ids[own.first + 1 :, None]).any(-1)
        known.append(is_known)
        tokens = theirs.token_logprobs
        assert np.array_equal(own.token_logprobs[is_known], tokens[is_known])
        assert (own.token_logprobs[~is_known] <= tokens[~is_known] + 1e-6).all()
    assert 0.05 < np.concatenate(known).mean() < 0.95


def test_its_rows_are_those_of_the_data(tiny, folder: Path) -> None:
    found = list(Rows((SourceConfig(path=str(folder), tokenizer=tiny.teacher),)))
    for row, plain in zip(found, read_rows(tiny.data), strict=True):
        assert (row.number, row.text, row.learned_pieces) == (plain.number, plain.text, plain.learned_pieces)
    some = SourceConfig(path=str(folder), tokenizer=tiny.teacher, limit=5, shuffle=True)
    assert len(list(Rows((some,), seed=1))) == 5


@pytest.mark.parametrize("method", [{"method": "spelling", "joint": False}, {"method": "uld"}])
def test_a_student_of_another_tokenizer_learns_as_from_our_own_cache(
    config, tiny, cached: Path, folder: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    own = {"teachers": [{"model": tiny.teacher, "cache": str(cached), "top_k": 40, **method}]}
    theirs = settings_of_set(tiny, folder, **method)
    losses = [
        run(config(settings | {"output": str(tmp_path / name)})).losses
        for name, settings in (("own", own), ("theirs", theirs))
    ]
    of = [
        [(step.loss, step.ce, step.teachers[0].kd, step.teachers[0].matched_mass) for step in each]
        for each in losses
    ]
    assert of[0] == of[1]
    assert len(of[0]) == 4


def test_a_share_is_held_out_and_a_plan_is_made(config, tiny, folder: Path) -> None:
    settings = settings_of_set(tiny, folder) | {"eval": {"share": 0.3, "every": 2}}
    found = plan(config(settings))
    assert found.held_out > 0
    assert any("of the tokens in the first 24 rows" in warning for warning in found.warnings)
    assert found.teachers[0].name == "big"


def test_a_set_that_becomes_a_cache_teaches_the_same(config, tiny, folder: Path, tmp_path: Path) -> None:
    made = cache_from_set(SetFiles(str(folder)), tmp_path / "made", tokenizer=tiny.teacher)
    assert (made.rows, made.k) == (24, K)
    rows = str(tmp_path / "made" / "rows.jsonl")
    teacher = {"model": tiny.teacher, "cache": str(tmp_path / "made"), "top_k": 40}
    settings = {"data": {"path": rows}, "teachers": [teacher], "output": str(tmp_path / "a")}
    losses = run(config(settings)).losses
    theirs = run(config(settings_of_set(tiny, folder) | {"output": str(tmp_path / "b")})).losses
    assert [step.loss for step in losses] == [step.loss for step in theirs]


@pytest.mark.parametrize("kept", ["plain", "float16", "quantised"])
def test_there_and_back_again(tiny, folder: Path, tmp_path: Path, kept: str) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "float16": {"dtype": "float16"},
        "quantised": {"quantised": True},
    }[kept]
    cache_from_set(SetFiles(str(folder)), tmp_path / "cache", tokenizer=tiny.teacher, **options)
    cache = TeacherCache.open(tmp_path / "cache", view_of(tiny))
    set_from_cache(cache, tmp_path / "set")
    one, two = (DistillKitSet(SetFiles(str(each)), view_of(tiny)) for each in (folder, tmp_path / "set"))
    assert len(one.rows) == len(two.rows) == 24
    tolerance = {"plain": 0, "float16": 0.01, "quantised": 0.2}[kept]
    for number in (1, 11, 24):
        a, b = one.row(number), two.row(number)
        assert np.array_equal(a.token_ids, b.token_ids)
        assert np.abs(a.logprobs[:, :8] - b.logprobs[:, :8]).max() <= tolerance


def test_a_cache_is_compressed_as_a_file_says(tiny, cached: Path, tmp_path: Path) -> None:
    file = tmp_path / "recommended.yaml"
    file.write_text(
        "d: 301\nk: 32\nexact_k: 8\nexact_dtype: float16\npolynomial_terms: [0, 1, 2, sqrt]\nresidual_bins: []\n"
        "delta_encoding: false\n"
    )
    made = set_from_cache(TeacherCache.open(cached), tmp_path / "set", compression=file)
    plain = set_from_cache(TeacherCache.open(cached), tmp_path / "plain", k=32)
    assert (made.rows, made.positions, made.k) == (plain.rows, plain.positions, 32)
    assert made.size < plain.size
    one, two = (DistillKitSet(SetFiles(str(tmp_path / name)), view_of(tiny)) for name in ("set", "plain"))
    a, b = one.row(5), two.row(5)
    assert np.array_equal(a.ids, b.ids)
    assert np.abs(a.logprobs - b.logprobs).max() < 0.1
    with pytest.raises(OutputExists):
        set_from_cache(TeacherCache.open(cached), tmp_path / "set")
    with pytest.raises(BadOption, match="`k` is 65; give at most 64"):
        set_from_cache(TeacherCache.open(cached), tmp_path / "more", k=65)


def test_the_whole_vocabulary_is_cut_to_the_likeliest(tiny, tmp_path: Path) -> None:
    settings = {"model": tiny.teacher, "data": tiny.data, "output": str(tmp_path / "all"), "k": 0, "limit": 3}
    write_cache(CacheSettings.model_validate(settings))
    cache = TeacherCache.open(tmp_path / "all")
    set_from_cache(cache, tmp_path / "set", k=10)
    found, own = DistillKitSet(SetFiles(str(tmp_path / "set")), view_of(tiny)).row(2), cache.row(2)
    assert np.allclose(found.logprobs, -np.sort(-own.logprobs, axis=1)[:, :10])


def test_chats_go_there_and_back_again(small_models: Path, tmp_path: Path) -> None:
    """Each answer is learned, and nothing that the user says."""
    teacher = str(small_models / "teacher")
    loaded = load_tokenizer(teacher)
    side = tokenizer_side(loaded.tokenizer, loaded.view)
    if side.chat is None:
        pytest.skip("no chat template here")
    turns = [
        ("user", "How much is 2 + 2?"),
        ("assistant", "It is 4."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages[:2]}) + "\n")
    settings = {
        "model": teacher,
        "data": str(data),
        "output": str(tmp_path / "cache"),
        "k": 20,
        "dtype": "float32",
    }
    write_cache(CacheSettings.model_validate(settings | {"template": "chat"}))
    cache = TeacherCache.open(tmp_path / "cache")
    set_from_cache(cache, tmp_path / "set")
    own = tokenize_rows(side, read_rows(str(data)), "chat")
    found = list(DistillKitSet(SetFiles(str(tmp_path / "set")), loaded.view).rows)
    for wanted, row in zip(own, tokenize_rows(side, found, "chat"), strict=True):
        assert np.array_equal(wanted.ids, row.ids)
        assert np.array_equal(wanted.turns, row.turns)
    assert [message.content for message in found[0].messages][-4:] == [content for _, content in turns]
    cache_from_set(SetFiles(str(tmp_path / "set")), tmp_path / "again", tokenizer=teacher)
    again = TeacherCache.open(tmp_path / "again", loaded.view)
    assert again.header.template == "chat"
    assert np.array_equal(again.row(1).logprobs, cache.row(1).logprobs)
    rows = read_rows(tmp_path / "again" / "rows.jsonl")
    assert [row.learned for row in rows] == [row.learned for row in found]


# What does not fit


def damaged(folder: Path, to: Path, **columns: Any) -> Path:
    """Copy a set, with other columns: a function of the old values, or None to leave one out."""
    import pyarrow as pa
    from pyarrow import parquet

    shutil.copytree(folder, to)
    table = parquet.read_table(to / "data_0.parquet")
    for name, change in columns.items():
        at = table.column_names.index(name)
        values = table.column(name).to_pylist()
        table = table.remove_column(at)
        if change is not None:
            table = table.add_column(at, name, pa.array(change(values)))
    parquet.write_table(table, to / "data_0.parquet")
    return to


def test_more_candidates_than_there_are(config, tiny, folder: Path) -> None:
    with pytest.raises(BadOption, match=r"`top_k` is 65; give at most 64: .* has no more$"):
        plan(config(settings_of_set(tiny, folder, top_k=65)))


def test_the_default_is_what_the_set_has(config, tiny, folder: Path) -> None:
    settings = settings_of_set(tiny, folder)
    del settings["teachers"][0]["top_k"]
    assert plan(config(settings)).teachers


def test_a_set_without_its_settings(config, tiny, folder: Path, tmp_path: Path) -> None:
    bare = damaged(folder, tmp_path / "bare")
    file = bare / CONFIG_FILE
    file.rename(tmp_path / "elsewhere.yaml")
    with pytest.raises(FileProblem, match="which says how the set is compressed; give `compression`"):
        plan(config(settings_of_set(tiny, bare)))
    assert plan(config(settings_of_set(tiny, bare, compression=str(tmp_path / "elsewhere.yaml")))).teachers


def test_another_tokenizer(config, tiny, folder: Path, tmp_path: Path) -> None:
    other = damaged(folder, tmp_path / "other")
    settings = (other / CONFIG_FILE).read_text()
    (other / CONFIG_FILE).write_text(settings.replace("d: 301", "d: 151936"))
    with pytest.raises(
        TokenizerMismatch, match=r"holds a vocabulary of 151,936, the tokenizer .* has 301 ids"
    ):
        plan(config(settings_of_set(tiny, other)))
    ids = damaged(folder, tmp_path / "ids", input_ids=lambda rows: [[i + 300 for i in row] for row in rows])
    with pytest.raises(TokenizerMismatch, match="holds ids up to"):
        plan(config(settings_of_set(tiny, ids)))


def test_a_row_whose_lengths_differ(tiny, folder: Path, tmp_path: Path) -> None:
    short = damaged(
        folder, tmp_path / "short", bytepacked_indices=lambda rows: [rows[0], rows[1][:-2], *rows[2:]]
    )
    found = DistillKitSet(SetFiles(str(short)), view_of(tiny))
    found.row(1)
    with pytest.raises(BadRow, match=r"short, row 2: it has \d+ ids, and bytepacked_indices for \d+ of them"):
        found.row(2)


def test_settings_of_another_set(tiny, folder: Path, tmp_path: Path) -> None:
    other = damaged(folder, tmp_path / "other")
    settings = (other / CONFIG_FILE).read_text()
    (other / CONFIG_FILE).write_text(settings.replace("k: 64\nexact_k: 64", "k: 63\nexact_k: 63"))
    with pytest.raises(
        BadRow, match="compressed_logprobs has 256 values at a position, and 252 by its settings"
    ):
        DistillKitSet(SetFiles(str(other)), view_of(tiny)).row(1)


def test_logits_in_place_of_log_probabilities(tiny, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    raw = tmp_path / "raw"
    raw.mkdir()
    ids = view_of(tiny).encode("the cat sits.").ids.tolist()
    logits = [[4.0, 2.0]] * len(ids)
    columns = {"input_ids": [ids], "token_ids": [[[5, 6]] * len(ids)], "top_values": [logits]}
    parquet.write_table(pa.table(columns), raw / "data.parquet")
    found = DistillKitSet(SetFiles(str(raw)), view_of(tiny))
    with pytest.raises(BadRow, match=r"sum up to 62; .*a set of logits cannot be read"):
        found.row(1)
    columns["top_values"] = [[[-0.5, -2.0]] * len(ids)]
    parquet.write_table(pa.table(columns), raw / "data.parquet")
    found = DistillKitSet(SetFiles(str(raw)), view_of(tiny))
    assert found.k == 2
    assert found.row(1).ids.tolist() == [[5, 6]] * (len(ids) - 1)


def test_other_columns_and_no_set_at_all(tiny, folder: Path, tmp_path: Path) -> None:
    bare = damaged(folder, tmp_path / "bare", compressed_logprobs=None)
    with pytest.raises(BadArtifact, match="it has no column compressed_logprobs, but input_ids"):
        DistillKitSet(SetFiles(str(bare)), view_of(tiny))
    texts = damaged(folder, tmp_path / "texts", input_ids=None)
    with pytest.raises(BadArtifact, match="it has no column input_ids"):
        DistillKitSet(SetFiles(str(texts)), view_of(tiny))
    with pytest.raises(FileProblem, match="there is no such set"):
        SetFiles(str(tmp_path / "nowhere")).table()


def test_settings_that_do_not_go_together(tiny, folder: Path) -> None:
    run_file = {"student": tiny.student, "output": "out", **settings_of_set(tiny, folder)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teachers": run_file["teachers"] * 2}, "several of kind distillkit"),
        ({"data": {"sources": [{"path": "a"}, {"path": "b"}]}}, "it is one set alone"),
        ({"data": {"path": str(folder), "tokenizer": "gpt2"}}, "data.tokenizer is gpt2"),
        ({"data": {"path": str(folder), "columns": {"text": "t"}}}, "columns is of no use"),
        ({"eval": {"path": "other.jsonl"}}, "which knows none of these rows"),
        ({"teachers": [run_file["teachers"][0] | {"cache": "c"}]}, "cache is of no use to a teacher of kind"),
        (
            {"teachers": [run_file["teachers"][0] | {"method": "cdm", "positions": "mean"}]},
            "mean needs whole logits",
        ),
    ]
    for change, fault in cases:
        with pytest.raises(BadSettings, match=fault):
            from_mapping(run_file | change)


def test_nothing_to_convert(tiny, folder: Path, tmp_path: Path) -> None:
    silent = damaged(folder, tmp_path / "silent", labels=lambda rows: [[-100] * len(row) for row in rows])
    with pytest.raises(NothingToTrain, match="24 rows, none with a text to learn"):
        cache_from_set(SetFiles(str(silent)), tmp_path / "out", tokenizer=tiny.teacher)


def test_a_converted_cache_is_not_read_with_other_rows(config, tiny, folder: Path, tmp_path: Path) -> None:
    cache_from_set(SetFiles(str(folder)), tmp_path / "made", tokenizer=tiny.teacher)
    rows = tmp_path / "rows.jsonl"
    lines = (tmp_path / "made" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows.write_text("\n".join([*lines[1:], json.dumps({"text": "other"})]), encoding="utf-8")
    teacher = {"model": tiny.teacher, "cache": str(tmp_path / "made"), "top_k": 40}
    with pytest.raises(BadArtifact, match="its data is"):
        plan(config({"data": {"path": str(rows)}, "teachers": [teacher]}))


ASK = """
import json, sys
from cdm_toolkit.errors import CdmError
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.integrations.distillkit import DistillKitSet, SetFiles
for path in sys.argv[2:]:
    try:
        found = DistillKitSet(SetFiles(path), load_tokenizer(sys.argv[1]).view)
        print(json.dumps([len(found.rows), float(found.row(3).logprobs.sum())]))
    except CdmError as error:
        print(json.dumps(str(error)))
"""


def test_a_set_on_the_hub(tiny, folder: Path, tmp_path: Path) -> None:
    """By id and revision, with the settings that are in its repository; without any, a file has to be given."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serve() as hub:
        hub.add("datasets/org/set", files)
        hub.add("datasets/org/bare", {"data_0.parquet": files["data_0.parquet"]})
        done = subprocess.run(
            [sys.executable, "-c", ASK, tiny.teacher, "org/set", "org/set@main", "org/bare", "org/none"],
            env=os.environ
            | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
    whole, at, bare, none = (json.loads(line) for line in done.stdout.splitlines())
    own = DistillKitSet(SetFiles(str(folder)), view_of(tiny))
    assert whole == at == [24, pytest.approx(float(own.row(3).logprobs.sum()))]
    assert "which says how the set is compressed; give `compression`" in bare
    assert none.startswith("org/none: it cannot be opened")
