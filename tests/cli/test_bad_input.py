"""A user's mistake is one line on stderr, status 2, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PAIR = ("--t1", "llama3", "--t2", "qwen2")


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}) + "\n", encoding="utf-8")
    return path


def refused(answer, *words: str) -> None:
    """Check that an answer is a refusal that says these words."""
    assert answer.status == 2, answer
    assert answer.out == ""
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("cdm: error: ")
    assert "Traceback" not in answer.err
    for word in words:
        assert word in lines[0], lines[0]


UNKNOWN = "no-such-tokenizer"
UNKNOWN_NAMES = {
    "align show": ("align", "show", "text", "--t1", UNKNOWN, "--t2", "qwen2"),
    "align report": ("align", "report", "ROWS", "--t1", UNKNOWN, "--t2", "qwen2"),
    "align export": ("align", "export", "ROWS", "--t1", UNKNOWN, "--t2", "qwen2", "-o", "OUT"),
    "tokenizer info": ("tokenizer", "info", UNKNOWN),
    "tokenizer diff": ("tokenizer", "diff", "llama3", UNKNOWN),
    "vocab-map export": ("vocab-map", "export", "--t1", UNKNOWN, "--t2", "qwen2", "-o", "OUT.json"),
    "vocab-map build": ("vocab-map", "build", "--t1", UNKNOWN, "--t2", "qwen2"),
    "student new": ("student", "new", "--tokenizer", UNKNOWN, "-o", "OUT"),
    "student transplant": ("student", "transplant", "--from", UNKNOWN, "--tokenizer", "mistral", "-o", "OUT"),
    "teacher cache": ("teacher", "cache", "--model", UNKNOWN, "--data", "ROWS", "-o", "OUT"),
    "distill": ("distill", "--teacher", UNKNOWN, "--student", UNKNOWN, "--data", "ROWS", "-o", "OUT"),
    "eval": ("eval", "--suite", "bpb", "--model", UNKNOWN, "--data", "ROWS"),
    "generate": ("generate", "text", "--model", UNKNOWN),
    "signal show": ("signal", "show", "text", "--teacher", UNKNOWN, "--student", "smollm2"),
    "models fetch": ("models", "fetch", UNKNOWN),
}


@pytest.mark.parametrize("arguments", UNKNOWN_NAMES.values(), ids=UNKNOWN_NAMES)
def test_an_unknown_name(cdm, rows: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    places = {"ROWS": str(rows), "OUT": str(tmp_path / "out"), "OUT.json": str(tmp_path / "out.json")}
    refused(cdm(*(places.get(word, word) for word in arguments)), UNKNOWN, "local folder")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.json").exists()


READS_A_FILE = {
    "align show": ("align", "show", *PAIR, "--file"),
    "align report": ("align", "report", *PAIR),
    "align export": ("align", "export", *PAIR, "-o", "OUT"),
    "tokenizer diff": ("tokenizer", "diff", "llama3", "qwen2", "--corpus"),
    "distill": ("distill", "--teacher", "smollm2", "--student", "smollm2", "-o", "OUT", "--data"),
    "eval": ("eval", "--suite", "bpb", "--model", "smollm2", "--data"),
    "signal show": ("signal", "show", "--teacher", "smollm2", "--student", "smollm2", "--data"),
}


@pytest.mark.parametrize("arguments", READS_A_FILE.values(), ids=READS_A_FILE)
def test_a_file_that_cannot_be_read(cdm, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    missing, empty, foreign, bad = (
        tmp_path / name for name in ("missing.jsonl", "empty.jsonl", "x.jsonl", "b.jsonl")
    )
    empty.touch()
    foreign.write_text('{"text": "fine"}\n{"body": "no field that is known"}\n', encoding="utf-8")
    bad.write_text('{"text": "fine"}\n\n{"text": \n', encoding="utf-8")
    refused(cdm(*command, missing), "missing.jsonl", "no such file")
    refused(cdm(*command, empty), "empty.jsonl")
    refused(cdm(*command, foreign), "row 2", "body")
    refused(cdm(*command, bad), "row 3")
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists(cdm, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious", encoding="utf-8")
    refused(cdm("align", "export", rows, *PAIR, "-o", out), "--overwrite")
    refused(cdm("student", "new", "--tokenizer", "mistral", "-o", out), "--overwrite")
    refused(
        cdm("distill", "--method", "sft", "--student", "smollm2", "--data", rows, "-o", out),
        "--overwrite",
    )
    refused(cdm("vocab-map", "export", *PAIR, "-o", rows, "--format", "json"), "--overwrite")
    both = ("--overwrite", "--resume")
    refused(cdm("distill", "run.yaml", *both), "--overwrite and --resume do not go together")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("place", ["/proc/no/such/out", "/dev/full/out"])
def test_a_place_that_cannot_be_written(cdm, rows: Path, place: str) -> None:
    refused(cdm("align", "export", rows, *PAIR, "-o", place), place)
    refused(cdm("student", "new", "--tokenizer", "mistral", "-o", place), place)
    refused(cdm("distill", "--method", "sft", "--student", "smollm2", "--data", rows, "-o", place), place)
    refused(cdm("vocab-map", "export", "--strategy", "exact", *PAIR, "-o", f"{place}.json"), place)
    refused(cdm("align", "show", "text", *PAIR, "--html", f"{place}.html"), place)


def test_options_out_of_range(cdm, rows: Path, tmp_path: Path) -> None:
    refused(cdm("align", "show", "text", *PAIR, "--aligner", "byte"), "aligner", "did you mean bytes?")
    refused(cdm("align", "show", *PAIR), "--file")
    refused(cdm("vocab-map", "build", *PAIR, "--max-edit-distance", "1.5"), "--max-edit-distance is 1.5")
    refused(cdm("vocab-map", "export", *PAIR, "-o", tmp_path / "map.xml"), "format", "xml")
    refused(
        cdm("vocab-map", "export", *PAIR, "-o", tmp_path / "m.json", "--strategy", "exakt"),
        "did you mean exact?",
    )
    refused(cdm("student", "new", "--tokenizer", "mistral", "-o", tmp_path / "s", "--size", "tiny"), "tiny")
    refused(cdm("eval", "--suite", "maths", "--model", "smollm2"), "did you mean math?")
    refused(cdm("eval", "--suite", "bpb", "--model", "smollm2", "--data", rows, "--limit", "0"), "--limit")
    refused(cdm("eval", "--suite", "bpb"), "--model")
    refused(cdm("nonsense"), "nonsense")


def test_all_faults_of_a_run_at_once(cdm, rows: Path, tmp_path: Path) -> None:
    answer = cdm(
        *("distill", "--teacher", "smollm2", "--student", "smollm2", "--data", rows, "-o", tmp_path / "out"),
        *("--alpha", "2", "--lr", "-1", "--method", "cmd"),
    )
    refused(answer, "3 faults", "--alpha is 2", "--lr is -1", "--method is", "did you mean cdm?")


def test_no_data_within_reach(cdm) -> None:
    refused(
        cdm("eval", "--suite", "math", "--model", "smollm2"),
        "no data",
        "tried --data: not given",
        "question and answer as --data",
    )


def test_a_device_that_is_not_here(cdm, rows: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused(cdm("eval", "--suite", "bpb", "--model", "smollm2", "--data", rows, "--device", "cuda"), "cuda")


def test_faults_name_the_options_where_there_is_no_run_file(cdm, rows: Path, tmp_path: Path) -> None:
    command = ("distill", "--student", "smollm2", "--data", rows, "-o", tmp_path / "out")
    refused(cdm(*command), "the command line has a fault: --teacher is missing; mend it and run again")
    teacher = ("--teacher", "smollm2")
    refused(cdm(*command, *teacher, "--max-steps", "0"), "--max-steps is 0: give a number of at least 1")
    refused(cdm(*command, *teacher, "--seed", "-1", "--alpha", "3"), "2 faults: --alpha is 3")
    refused(
        cdm(*command, *teacher, "--method", "kl", "--set", "teachers.0.max_edit_distance=0.2"),
        "a fault: teachers.0.max_edit_distance is of no use to kl: it has temperature, top_k",
    )
    refused(cdm(*command, *teacher, "--set", "train.lrr=1"), "train.lrr is no setting")
    refused(cdm(*command[:-2], *teacher), "--output is missing")


def test_a_setting_without_an_option_is_named(cdm) -> None:
    for flag, setting in (("--save-every", "train.save_every"), ("--tau", "teachers.0.tau")):
        refused(
            cdm("distill", flag, "1"),
            f"No such option: {flag}",
            f"It is a setting of the run: --set {setting}=…",
        )
    assert "setting of the run" not in cdm("distill", "--save-evry", "1").err
