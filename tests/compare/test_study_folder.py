"""The output folder of a study: whose it is, cells that come back, locks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cdm_toolkit.compare.prepared import prepare
from cdm_toolkit.compare.study import StudyConfig, from_file
from cdm_toolkit.compare.study_folder import CELL_FILE, SHARED_FILE, Stored, StudyFolder, is_held, only_one
from cdm_toolkit.compare.summary import results_record
from cdm_toolkit.compare.types import StudyResult
from cdm_toolkit.errors import BadArtifact, FileProblem


@pytest.fixture
def study() -> StudyConfig:
    return from_file("quickstart-small")


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "out")


def begun(folder: StudyFolder, study: StudyConfig) -> None:
    folder.claim(study)
    folder.shared.mkdir()
    (folder.shared / SHARED_FILE).write_text("{}")


def test_a_folder_is_one_studys(study: StudyConfig, folder: StudyFolder) -> None:
    begun(folder, study)
    folder.claim(study)
    assert folder.read_study() == study
    other = from_file(
        "quickstart-small", ["steps=3", "run.weight_decay=0.1", "outside.more={path: python:code}"]
    )
    with pytest.raises(BadArtifact) as caught:
        folder.claim(other)
    for words in (
        "steps is 25 there and 3 now",
        "run.weight_decay is 0.0 there and 0.1 now",
        "outside.more is only now",
        "`overwrite`",
    ):
        assert words in str(caught.value)
    assert folder.read_study() == study


def test_many_differences_are_counted(study: StudyConfig, folder: StudyFolder) -> None:
    begun(folder, study)
    sets = ["steps=3", "max_length=99", "run.lr=0.1", "threads=2", "student.entries=90", "teacher=gpt2"]
    with pytest.raises(BadArtifact, match=r"there and .* now and 2 more; give another `output`"):
        folder.claim(from_file("quickstart-small", sets))


def test_what_is_said_of_a_study_may_change(folder: StudyFolder, study: StudyConfig) -> None:
    begun(folder, study)
    folder.claim(from_file("quickstart-small", ["name=other", "about=Another", "default=exact"]))
    assert folder.read_study().about == "Another"


def test_a_study_that_could_not_begin_may_be_put_right(folder: StudyFolder, study: StudyConfig) -> None:
    folder.claim(from_file("quickstart-small", ["teacher=teachr"]))
    folder.shared.mkdir()
    (folder.shared / "train.jsonl").write_text("of the study that could not begin")
    with only_one(folder.shared, ""), pytest.raises(BadArtifact, match="at work in shared;"):
        folder.claim(study)
    folder.check(study)
    folder.claim(study)
    assert folder.read_study() == study
    assert not folder.shared.exists()
    with pytest.raises(BadArtifact, match="it holds another study: teacher is "):
        prepare(
            from_file("quickstart-small", ["teacher=gpt2"]), folder
        )  # of a process that claimed it before


def test_a_study_may_grow(folder: StudyFolder, study: StudyConfig) -> None:
    begun(folder, study)
    sets = ["methods.more={method: exact}", "seeds=[0,1]", "curves={exact: [0.2]}", "alpha=0.4"]
    grown = from_file("quickstart-small", sets)
    folder.check(grown)
    assert folder.read_study() == study
    folder.claim(grown)
    assert folder.read_study() == grown


def test_the_order_of_methods_is_kept(folder: StudyFolder, study: StudyConfig) -> None:
    begun(folder, study)
    turned = study.model_copy(update={"methods": dict(reversed(study.methods.items()))})
    folder.claim(turned)
    assert list(folder.read_study().methods) == list(turned.methods)


def test_to_start_anew_removes_what_a_study_wrote(folder: StudyFolder, study: StudyConfig) -> None:
    folder.claim(study)
    (folder.path / "mine.txt").write_text("kept")
    for name in ("cells/000-sft/cell.json", "shared/shared.json", "results.json", "bars.png"):
        (folder.path / name).parent.mkdir(exist_ok=True, parents=True)
        (folder.path / name).write_text("{}")
    folder.claim(from_file("quickstart-small", ["steps=3"]), overwrite=True)
    assert folder.read_study().steps == 3
    assert {path.name for path in folder.path.iterdir() if path.name[0] != "."} == {"mine.txt", "study.yaml"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_something_else_is_left_alone(
    folder: StudyFolder, study: StudyConfig, overwrite: bool
) -> None:
    folder.path.mkdir()
    (folder.path / "results.json").write_text("mine")
    with pytest.raises(FileProblem, match="it is not empty, and holds no study"):
        folder.claim(study, overwrite=overwrite)
    assert (folder.path / "results.json").read_text() == "mine"


def test_a_place_that_is_a_file(tmp_path: Path, study: StudyConfig) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileProblem, match="cannot be written"):
        StudyFolder(tmp_path / "out").claim(study)


THE_SAME = from_file("quickstart-small", ["methods.spelling.top_k=64", "steps=60"])
"""A study whose method spelling is that of `stored`."""


@pytest.fixture
def stored(make_study: Callable[..., StudyResult]) -> Stored:
    result, options = make_study(("spelling",)).cells[0], THE_SAME.methods["spelling"].options()
    return Stored(result, options, "a machine", ("a warning",), {"fingerprints": {"student": "a"}})


def test_a_cell_comes_back_as_it_was(folder: StudyFolder, stored: Stored) -> None:
    assert folder.read_cell(THE_SAME, stored.result.cell) is None
    folder.write_cell(stored)
    assert folder.read_cell(THE_SAME, stored.result.cell) == stored


def test_a_cell_is_found_where_a_study_has_grown(folder: StudyFolder, stored: Stored) -> None:
    folder.write_cell(stored)
    now = replace(stored.result.cell, index=7, in_curve=True)
    assert folder.read_cell(THE_SAME, now) == replace(stored, result=replace(stored.result, cell=now))


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("top_k=65", "top_k is 64 there and 65 now"),
        ("intra_group=false", "intra_group is true there and false now"),
    ],
)
def test_a_cell_with_other_options_is_told(
    folder: StudyFolder, stored: Stored, option: str, told: str
) -> None:
    folder.write_cell(stored)
    other = from_file("quickstart-small", ["methods.spelling.top_k=64", f"methods.spelling.{option}"])
    with pytest.raises(
        BadArtifact, match=f"{told}; give the method another name, or run it again with `cell=0`"
    ):
        folder.read_cell(other, stored.result.cell)


@pytest.mark.parametrize("steps", ["steps=61", "methods.spelling.steps=61"])
def test_a_cell_with_other_steps_is_told(folder: StudyFolder, stored: Stored, steps: str) -> None:
    folder.write_cell(stored)
    other = from_file("quickstart-small", ["methods.spelling.top_k=64", "steps=60", steps])
    told = "trained for 60 steps, not for 61; give the method another name, or run it again with `cell=0`"
    with pytest.raises(BadArtifact, match=told):
        folder.read_cell(other, stored.result.cell)


def test_a_cell_of_the_version_before_is_read_without_words(folder: StudyFolder, stored: Stored) -> None:
    folder.write_cell(stored)
    file = folder.of(stored.result.cell) / CELL_FILE
    content = json.loads(file.read_text())
    content["version"] = 2
    del content["result"]["scores"]["near"]
    for of_kind in content["result"]["scores"].values():
        for measured in of_kind.values():
            for name in ("words", "predicted_words", "digit_bytes", "digit_bits"):
                del measured[name]
    file.write_text(json.dumps(content))
    found = folder.read_cell(THE_SAME, stored.result.cell)
    assert found == stored


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:100],
        lambda text: text.replace('"steps"', '"stpes"'),
        lambda text: text.replace('"bits"', '"bytes"', 1),
    ],
)
def test_a_damaged_cell_is_told(folder: StudyFolder, stored: Stored, damage: Callable[[str], str]) -> None:
    folder.write_cell(stored)
    file = folder.of(stored.result.cell) / CELL_FILE
    file.write_text(damage(file.read_text()))
    with pytest.raises(BadArtifact, match=r"it is damaged .*; run it again with `cell=0` and `overwrite`"):
        folder.read_cell(THE_SAME, stored.result.cell)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            lambda text: text.replace('"version": 3', '"version": 1'),
            "format version 1, this tool reads 3 and 2",
        ),
        (
            lambda text: text.replace('"version": 3', '"version": 4'),
            "format version 4, this tool reads 3 and 2",
        ),
        (lambda text: "[]", "this is no cdm-toolkit study cell file"),
    ],
)
def test_a_cell_of_another_format_is_told(
    folder: StudyFolder, stored: Stored, other: Callable[[str], str], told: str
) -> None:
    folder.write_cell(stored)
    file = folder.of(stored.result.cell) / CELL_FILE
    file.write_text(other(file.read_text()))
    with pytest.raises(BadArtifact, match=f"{told}; .*run it again with `cell=0` and `overwrite`"):
        folder.read_cell(THE_SAME, stored.result.cell)


def test_all_cells_that_cannot_be_used_are_told_at_once(folder: StudyFolder, stored: Stored) -> None:
    folder.write_cell(stored)
    more = replace(stored.result.cell, seed=5, index=4)
    folder.write_cell(replace(stored, result=replace(stored.result, cell=more)))
    other = from_file("quickstart-small", ["methods.spelling.top_k=65"])
    with pytest.raises(BadArtifact, match=r"2 cells cannot be used; the first: .* with other options"):
        folder.read_cells(other, [stored.result.cell, more])
    assert list(folder.read_cells(THE_SAME, [stored.result.cell, more])) == [stored.result.cell, more]


def test_a_cell_in_anothers_place_is_told(folder: StudyFolder, stored: Stored) -> None:
    folder.write_cell(stored)
    other = replace(stored.result.cell, seed=5)
    folder.of(stored.result.cell).rename(folder.of(other))
    with pytest.raises(BadArtifact, match=f"it has the cell {stored.result.cell.name}"):
        folder.read_cell(THE_SAME, other)


def test_results_are_plain_json(folder: StudyFolder, full_study: StudyResult) -> None:
    content = json.loads(folder.write_results(results_record(full_study)).read_text(encoding="utf-8"))
    assert content["cells"][0]["cell"]["method"] == "sft"
    assert content["start"]["inside"]["code"]["scored_bytes"] == 4000


HOLD = """
import sys, time
from pathlib import Path
from cdm_toolkit.compare.study_folder import only_one
with only_one(Path(sys.argv[1]), "holds it", print):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_second_process_waits_and_says_so(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "1.5"], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        assert is_held(tmp_path)
        said: list[str] = []
        began = time.monotonic()
        with only_one(tmp_path, "prepares this study", said.append):
            assert time.monotonic() - began > 0.3
        assert said == ["waiting for another process that prepares this study"]
    assert not is_held(tmp_path)


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "60"], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        other.kill()
        other.wait()
    said: list[str] = []
    with only_one(tmp_path, "prepares this study", said.append):
        assert not said
