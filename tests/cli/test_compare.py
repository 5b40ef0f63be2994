"""`cdm compare`: cells listed, run and drawn, what is wrong in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cdm_toolkit.compare.study import list_studies
from cdm_toolkit.compare.study_folder import CELL_FILE

STUDY: dict[str, Any] = {
    "about": "Sums.",
    "train": {"sums": {"path": "sample:train", "rows": 6}},
    "inside": {"sums": {"path": "sample:heldout", "rows": 3}},
    "outside": {"manual": {"path": "python:manual", "rows": 2}},
    "max_length": 400,
    "steps": 2,
    "run": {"lr": 1e-3, "batch_size": 2},
    "default": "exact",
    "methods": {"sft": {}, "exact": {"method": "exact", "top_k": 20}},
}


@pytest.fixture(scope="module")
def study(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a study of two small models."""
    path = tmp_path_factory.mktemp("study") / "small.yaml"
    pair = {"teacher": str(small_models / "teacher"), "student": str(small_models / "student")}
    path.write_text(yaml.safe_dump(STUDY | pair, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_once(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run both cells of the study, each alone."""
    from cdm_toolkit.cli import main

    output = tmp_path_factory.mktemp("out") / "out"
    for cell in "01":
        assert main(["compare", str(study), "-o", str(output), "--cell", cell]) == 0
    return output


@pytest.fixture
def output(run_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_once, tmp_path / "out")
    return tmp_path / "out"


def test_without_a_study_the_shipped_ones_are_named(cdm: Callable[..., Any]) -> None:
    answer = cdm("compare")
    assert (answer.status, answer.out) == (2, "")
    for name in list_studies():
        assert name in answer.err
    assert "did you mean transfer-small?" in cdm("compare", "transfersmall").err
    assert "there is no such file" in cdm("compare", "none.yaml").err


def test_cells_are_listed_before_anything_is_run(cdm, study: Path, tmp_path: Path) -> None:
    answer = cdm("compare", study, "-o", tmp_path / "out", "--list", "--set", "seeds=[4,5]")
    assert answer.status == 0
    assert "0 of 4 cells are done" in answer.err
    listed = json.loads(cdm("compare", study, "-o", tmp_path / "out", "--list", "--json").out)
    assert [each["method"] for each in listed] == ["sft", "exact"]
    assert {each["state"] for each in listed} == {""}
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_listed(cdm, study: Path, output: Path) -> None:
    (output / "cells" / "exact-alpha0.5-seed0" / CELL_FILE).unlink()
    (output / "cells" / "exact-alpha0.5-seed0" / "log.txt").write_text("cdm: error: it broke")
    listed = json.loads(cdm("compare", study, "-o", output, "--list", "--json").out)
    assert [each["state"] for each in listed] == ["done", "failed"]


def test_a_finished_study_is_drawn(cdm, study: Path, output: Path) -> None:
    answer = cdm("compare", study, "-o", output)
    assert answer.status == 0, answer.err
    for word in ("small: ", "sft", "exact", "teacher", "report.html", "trade-off.png", "results.json"):
        assert word in answer.out
    page = (output / "report.html").read_text(encoding="utf-8")
    assert f"cdm compare {study} -o {output}" in page
    record = json.loads(cdm("compare", study, "-o", output, "--report", "--json").out)
    assert record == json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert record["headline"] in page
    assert {name for column in record["table"] for name in column["means"]} == {"sft", "exact"}


def test_a_report_of_a_part(cdm, study: Path, output: Path) -> None:
    (output / "cells" / "exact-alpha0.5-seed0" / CELL_FILE).unlink()
    answer = cdm("compare", study, "-o", output, "--report")
    assert answer.status == 0, answer.err
    assert "note: 1 of 2 cells are measured" in answer.out
    assert "has not been prepared" in cdm("compare", study, "-o", output / "new", "--report").err


def test_a_cell_alone(cdm, study: Path, output: Path) -> None:
    answer = cdm("compare", study, "-o", output, "--cell", 1, "--json")
    assert json.loads(answer.out)["cell"]["method"] == "exact"
    answer = cdm("compare", study, "-o", output, "--cell", 1)
    assert answer.out.startswith("cell 1 (exact, seed 0): 2 steps of ")
    assert answer.out.strip().endswith(f"put together with: cdm compare {study} -o {output} --report")
    assert "--cell is '2'; give 0 to 1" in cdm("compare", study, "-o", output, "--cell", 2).err


def test_a_study_may_grow(cdm, study: Path, output: Path) -> None:
    more = ("--set", "methods.more={method: exact, top_k: 5}", "--list", "--json")
    listed = json.loads(cdm("compare", study, "-o", output, *more).out)
    assert [(each["method"], each["state"]) for each in listed] == [
        ("sft", "done"),
        ("exact", "done"),
        ("more", ""),
    ]
    changed = ("compare", study, "-o", output, "--set", "methods.exact.top_k=5")
    answer = cdm(*changed, "--list", "--json")
    assert [each["state"] for each in json.loads(answer.out)] == ["done", "unusable"]
    told = "other options: top_k is 20 there and 5 now; give the method another name, or run it again with --cell 1"
    assert told in answer.err
    before = (output / "study.yaml").read_bytes()
    for words in ((), ("--report",)):
        answer = cdm(*changed, *words)
        assert (answer.status, answer.out) == (2, "")
        assert told in answer.err
    assert (output / "study.yaml").read_bytes() == before
    assert cdm(*changed, "--cell", 1, "--overwrite").status == 0


def test_a_cell_by_its_name(cdm, study: Path, output: Path) -> None:
    answer = cdm("compare", study, "-o", output, "--cell", "exact-alpha0.5-seed0")
    assert answer.out.startswith("cell 1 (exact, seed 0): ")


def test_a_report_of_nothing_leaves_what_is_there(cdm, study: Path, output: Path) -> None:
    assert cdm("compare", study, "-o", output, "--report").status == 0
    before = (output / "results.json").read_bytes()
    shutil.rmtree(output / "cells")
    answer = cdm("compare", study, "-o", output, "--report")
    assert answer.status == 2
    assert "none of its cells has been run" in answer.err
    assert (output / "results.json").read_bytes() == before


def test_another_study_is_refused(cdm, study: Path, output: Path) -> None:
    answer = cdm("compare", study, "-o", output, "--set", "steps=9")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.count("\n") == 1
    assert "it holds another study: steps is 2 there and 9 now" in answer.err
    assert "--overwrite" in answer.err


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "train.sums.path=nowhere.jsonl"],
        ["--set", "inside.sums.rows=9999", "--cell", "0"],
        ["--report"],
    ],
)
def test_a_study_that_cannot_begin_takes_no_folder(
    cdm, study: Path, tmp_path: Path, words: list[str]
) -> None:
    """Else the command with the right file would be refused, as another study."""
    assert cdm("compare", study, "-o", tmp_path / "out", *words).status == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--list", "--report"], "--list and --report do not go together; give one of them"),
        (["--cell", "1", "--list"], "--cell and --list do not go together"),
        (["--report", "--overwrite"], "--overwrite and --report do not go together"),
        (["--set", "steps"], "KEY=VALUE"),
        (["--set", "methods.exact.lr=1"], "the cells of a study share data, teacher and student"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_a_mistake_is_one_line(cdm, study: Path, tmp_path: Path, words: list[str], said: str) -> None:
    answer = cdm("compare", study, "-o", tmp_path / "out", *words)
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_drawing_is_possible_before_anything_is_run(cdm, study: Path, tmp_path: Path, monkeypatch) -> None:
    from importlib import util

    monkeypatch.setattr(util, "find_spec", lambda _name: None)
    answer = cdm("compare", study, "-o", tmp_path / "out")
    assert 'pip install "cdm-toolkit[compare]"' in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cells_are_forked")
def test_a_study_with_a_cell_that_fails(cdm, study: Path, output: Path) -> None:
    words = ["--set", "methods.kl={method: kl}", "--overwrite"]
    answer = cdm("compare", study, "-o", output, *words)
    assert answer.status == 2
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("cdm: error: a cell failed: cell 2 (kl, seed 0): the method of ")
    assert last.endswith("--set 'methods.kl={method: kl}' --cell 2")
    assert "cell 0 (sft, seed 0) is done" in answer.err
    assert "note: 2 of 3 cells are measured" in answer.out
    assert "exact" in answer.out
