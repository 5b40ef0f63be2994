"""`cdm teacher`: a cache from the command line, and every mistake in one line."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cdm_toolkit.artifacts.teacher_cache import TeacherCache

from ..teachers.scoring_server import ScoringServer

ROWS = 12


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, real_view) -> str:
    """Make a fresh small model with the first entries of a real vocabulary."""
    from cdm_toolkit.hub.students import new_student

    real_view("smollm2")
    folder = tmp_path_factory.mktemp("teacher")
    new_student("smollm2", "200k", folder, entries=1100)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}."} for n in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def words(teacher: str, data: Path, tmp_path: Path) -> list[str]:
    """Give the words of a command that is right."""
    return ["teacher", "cache", "--model", teacher, "--data", str(data), "-o", str(tmp_path / "cached")]


def refused(answer, *words: str) -> None:
    assert answer.status == 2, answer
    assert answer.out == ""
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("cdm: error: ")
    for word in words:
        assert word in lines[0], lines[0]


def test_a_teacher_in_fewer_bits(cdm, words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    made = cdm(*words, "--quantization", "8bit", "--device-map", "{model: cpu, lm_head: cpu}")
    assert made.status == 0, made.err
    assert "device: several, by device_map {'model': 'cpu', 'lm_head': 'cpu'}" in made.err
    assert "run in 8bit" in cdm("teacher", "info", tmp_path / "cached").out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--quantization", "4bit", "--teacher-dtype", "float32"),
            "teacher_dtype goes not with quantization",
        ),
        (("--device-map", "auto", "--device", "cpu"), "device goes not with device_map"),
        (("--quantization", "2bit"), "quantization is '2bit': give one of 4bit, 8bit"),
        (("--device-map", "even"), "--device-map is 'even'; give one of auto, balanced"),
        (("--device-map", "{model: cuda:9}"), "--device-map is 'cuda:9'; give"),
        (("--device-map", "{model: [}"), "is not YAML: quote it"),
        (("--device-map", "{model: 1.5}"), "device_map"),
    ],
    ids=str,
)
def test_a_teacher_that_cannot_be_loaded_so(
    cdm, words: list[str], options: tuple[str, ...], said: str
) -> None:
    refused(cdm(*words, *options), said)


def test_cache_and_info(cdm, words: list[str], tmp_path: Path) -> None:
    made = cdm(*words, "--rows-per-shard", 5, "--json")
    assert made.status == 0, made.err
    said = json.loads(made.out)
    assert said["rows"] == ROWS
    assert said["made"] == ["shard-00001", "shard-00002", "shard-00003"]
    assert said["bytes_per_token"] == said["size"] / said["tokens"]
    again = cdm(*words, "--rows-per-shard", 5)
    assert "0 made, 3 were there" in again.out
    shown = cdm("teacher", "info", tmp_path / "cached", "--json")
    about = json.loads(shown.out)
    assert (about["tokens"], about["size"], about["k"]) == (said["tokens"], said["size"], 100)
    assert about["provenance"]["versions"]["cdm-toolkit"]
    shown = cdm("teacher", "info", tmp_path / "cached")
    for fact in ("top 100 of 1,100 ids, float16", "3, all as they were written", "bytes a token"):
        assert fact in shown.out


def test_parts_say_what_is_left(cdm, words: list[str], tmp_path: Path) -> None:
    first = cdm(*words, "--rows-per-shard", 5, "--shard", "1/2", "--quantised")
    assert "2 made; 1 of 3 are left for other parts" in first.out
    refused(cdm("teacher", "info", tmp_path / "cached"), "1 of 3 shards are missing", "--shard 2/3")
    assert cdm(*words, "--rows-per-shard", 5, "--shard", "2/2", "--quantised").status == 0
    assert cdm("teacher", "info", tmp_path / "cached").status == 0


MISTAKES = {
    "k too large": (["-k", "1101"], ["-k is 1101", "at most 1100"]),
    "k negative": (["-k", "-1"], ["k is -1"]),
    "no part": (["--shard", "5/4"], ["'5/4' is no part", "1/4"]),
    "part zero": (["--shard", "0/4"], ["is no part"]),
    "part of words": (["--shard", "first"], ["is no part"]),
    "dtype": (["--dtype", "int8"], ["dtype is 'int8'", "float16, float32"]),
    "template": (["--template", "caht"], ["template is 'caht'", "did you mean chat?"]),
    "quantised float32": (["--quantised", "--dtype", "float32"], ["quantised keeps no float32"]),
    "whole quantised": (["-k", "0", "--quantised"], ["whole vocabulary"]),
    "batch size": (["--batch-size", "0"], ["batch_size is 0"]),
    "limit": (["--limit", "0"], ["limit is 0"]),
    "device": (["--device", "warp"], ["device is 'warp'"]),
    "no such model": (["--model", "no-such-model"], ["no-such-model"]),
    "no such data": (["--data", "no-such.jsonl"], ["no-such.jsonl", "there is no such file"]),
}


@pytest.mark.parametrize(("change", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(
    cdm, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], said: list[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(cdm(*words, *change), *said)
    assert not (tmp_path / "cached").exists()


def test_a_tokenizer_is_no_model(cdm, words: list[str], teacher: str, tmp_path: Path) -> None:
    (bare := tmp_path / "bare").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (bare / name).write_bytes((Path(teacher) / name).read_bytes())
    refused(cdm(*words, "--model", bare), str(bare), "no weights")
    assert not (tmp_path / "cached").exists()


def test_data_without_rows(cdm, words: list[str], data: Path) -> None:
    data.write_text("\n")
    refused(cdm(*words), "it has no rows")
    data.write_text('{"question": "1 + 1?", "answer": ""}\n')
    refused(cdm(*words), "no row can be trained on", "empty completion")


def test_another_cache_in_the_folder(cdm, words: list[str]) -> None:
    assert cdm(*words).status == 0
    refused(cdm(*words, "-k", "32"), "it holds another cache: --top-k is 100 there and 32 now")
    refused(cdm(*words, "--limit", "3"), "the data is", "the count of rows is 12 there and 3 now")


def test_damage_is_found_and_mended(cdm, words: list[str], tmp_path: Path) -> None:
    assert cdm(*words).status == 0
    shard = tmp_path / "cached" / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    refused(
        cdm("teacher", "info", tmp_path / "cached"),
        "shard-00001.safetensors",
        "instead of",
        "cdm teacher cache",
    )
    mended = cdm(*words)
    assert "shard-00001 was damaged, and was made again" in mended.err
    assert shard.read_bytes() == whole
    refused(cdm("teacher", "info", tmp_path / "nothing"), "there is no teacher cache here")


def test_no_space_left(cdm, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from cdm_toolkit.artifacts import atomic

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    refused(cdm(*words), "No space left on device")
    monkeypatch.undo()
    assert cdm(*words).status == 0


def test_a_cache_becomes_a_set_of_distillkits_and_a_cache_again(
    cdm, words: list[str], teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    assert cdm(*words, "--dtype", "float32", "-k", 20).status == 0
    cached, made, back = (str(tmp_path / name) for name in ("cached", "set", "back"))
    answer = cdm("teacher", "convert", cached, "-o", made, "--json")
    assert answer.status == 0, answer.err
    said = json.loads(answer.out)
    assert (said["rows"], said["k"], said["folder"]) == (ROWS, 20, made)
    assert sorted(path.name for path in Path(made).iterdir()) == ["compression_config.yaml", "data_0.parquet"]
    answer = cdm("teacher", "convert", made, "--tokenizer", teacher, "-o", back)
    assert answer.status == 0, answer.err
    assert cdm("teacher", "info", back).status == 0
    rows = [json.loads(line) for line in (tmp_path / "back" / "rows.jsonl").read_text().splitlines()]
    assert rows[3]["text"] == "3 + 3?\nIt is 6."


def test_what_cannot_be_converted(cdm, words: list[str], teacher: str, tmp_path: Path) -> None:
    assert cdm(*words, "-k", 20).status == 0
    cached, made = str(tmp_path / "cached"), str(tmp_path / "set")
    convert = ["teacher", "convert", cached, "-o", made]
    refused(cdm(*convert, "--tokenizer", teacher), "--tokenizer is", "the source is a cache")
    refused(cdm(*convert, "-k", 21), "--top-k is 21; give at most 20")
    refused(
        cdm("teacher", "convert", tmp_path / "none", "-o", made),
        "--tokenizer is None; give that of the model",
    )
    none = ["teacher", "convert", str(tmp_path / "none"), "-o", made, "--tokenizer", teacher]
    refused(cdm(*none), "there is no such set")
    refused(cdm(*none, "-k", 5), "the source is a set")
    refused(cdm(*none, "--quantised", "--dtype", "float16"), "--dtype and --quantised do not go together")
    assert cdm(*convert).status == 0
    Path(made, "compression_config.yaml").write_text(
        "d: 1100\nk: 20\nexact_k: 20\nresidual_bins: []\nzip: 1\n"
    )
    of_set = ["teacher", "convert", made, "-o", str(tmp_path / "back"), "--tokenizer", teacher]
    refused(cdm(*of_set), "compression_config.yaml has a fault: zip is no setting")
    Path(made, "compression_config.yaml").unlink()
    refused(cdm(*of_set), "there is no such file", "--compression")


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with(cdm, start_cdm, words: list[str], tmp_path: Path) -> None:
    """SIGKILL after the first shard; the same command finishes, and keeps what was there."""
    folder, command = tmp_path / "cached", [*words, "--rows-per-shard", "1", "--batch-size", "1"]
    child = start_cdm(*command)
    until = time.monotonic() + 120
    while not (folder / "shard-00001.json").exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.safetensors")}
    finished = [path for path in kept if path.with_suffix(".json").exists()]
    assert 1 <= len(finished) < ROWS
    assert cdm(*command).status == 0
    assert cdm("teacher", "info", folder).status == 0
    assert all(path.stat().st_mtime_ns == kept[path] for path in finished)
    assert not list(folder.glob(".*"))


def test_a_server_is_checked_and_asked(cdm, teacher: str, data: Path, tmp_path: Path) -> None:
    from cdm_toolkit.hub.models import load_model
    from cdm_toolkit.hub.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(teacher).tokenizer
    with ScoringServer(load_model(teacher), name="big", tokenizer=tokenizer, max_logprobs=20) as server:
        words = [
            "teacher",
            "check",
            "--url",
            server.url,
            "--model",
            "big",
            "--tokenizer",
            teacher,
            "--texts",
            4,
        ]
        made = cdm(*words, "--against", teacher, "--json")
        assert made.status == 0, made.err
        said = json.loads(made.out)
        assert (said["k"], said["texts"], said["retries"]) == (20, 4, 0)
        assert said["agreement"]["largest"] < 1e-4
        assert said["agreement"]["same_best"] == 1
        assert said["tokens_per_second"] == said["tokens"] / said["seconds"]
        assert "gives 20 candidates" in made.err
        shown = cdm(*words)
        assert "20 at each token" in shown.out
        asked = ["teacher", "cache", "--model", "big", "--tokenizer", teacher, "--url", server.url]
        asked += ["--data", str(data), "--rows-per-shard", 5]
        said = json.loads(cdm(*asked, "-o", tmp_path / "served", "--dtype", "float32", "--json").out)
        assert (said["rows"], said["made"]) == (ROWS, ["shard-00001", "shard-00002", "shard-00003"])
        local = [
            "teacher",
            "cache",
            "--model",
            teacher,
            "--data",
            str(data),
            "-k",
            20,
            "-o",
            tmp_path / "local",
        ]
        assert cdm(*local, "--dtype", "float32").status == 0
        one, other = (TeacherCache.open(tmp_path / name) for name in ("served", "local"))
        for number in range(1, ROWS + 1):
            ours, known = one.row(number), other.row(number)
            assert ours.token_ids.tolist() == known.token_ids.tolist()
            np.testing.assert_allclose(ours.logprobs, known.logprobs, atol=1e-4)
            np.testing.assert_allclose(ours.token_logprobs, known.token_logprobs, atol=1e-4)
        refused(cdm(*asked, "-o", tmp_path / "b", "-k", 30), "-k is 30", "at most 20", "--max-logprobs 30")
        refused(cdm(*asked, "-o", tmp_path / "b", "-k", 0), "whole vocabulary")
        refused(
            cdm(*asked, "-o", tmp_path / "b", "--device", "cpu"), "of no use where a server has the model"
        )
        refused(cdm(*words[:4], "--model", "other", "--tokenizer", teacher), "no model 'other'")
    refused(cdm(*words), "cannot be reached (connection refused)", "--url")
    refused(cdm("teacher", "check", "--url", f"{server.url}/v1", "--model", "big"), "a path too many")
