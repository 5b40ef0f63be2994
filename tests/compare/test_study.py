"""Study files: what they may say, all that is wrong at once, and the cells that they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cdm_toolkit.compare.cells import cell_at, grid
from cdm_toolkit.compare.study import StudyConfig, find_study, from_file, list_studies
from cdm_toolkit.errors import BadOption, BadRunConfig, FileProblem, UnknownName

STUDY: dict[str, Any] = {
    "teacher": "smollm2",
    "student": {"transplant": "smollm2", "tokenizer": "gpt2", "entries": 6000},
    "train": {"sums": {"path": "sample:train", "rows": 4}, "code": {"path": "python:code"}},
    "inside": {"sums": {"path": "sample:heldout", "rows": 2}},
    "outside": {"manual": {"path": "python:manual", "rows": 2}},
    "steps": 3,
    "seeds": [0, 7],
    "default": "cdm",
    "methods": {
        "sft": None,
        "paper": {"preset": "paper"},
        "cdm": {"method": "cdm", "top_k": 20},
        "cdm k=5": {"method": "cdm", "top_k": 5, "seeds": [3]},
    },
    "curves": {"cdm": [0.9, 0.1]},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False), encoding="utf-8")
    return path


def faults(file: Path, *assignments: str) -> str:
    with pytest.raises(BadRunConfig) as caught:
        from_file(str(file), assignments)
    return str(caught.value)


def test_a_study_is_stopped_early_and_still_compares(file: Path) -> None:
    cells = grid(from_file(str(file)))
    assert [cell.index for cell in cells] == list(range(9))
    assert [(cell.method, cell.alpha, cell.seed, cell.in_curve) for cell in cells] == [
        ("sft", 1.0, 0, False),
        ("paper", 0.9, 0, False),
        ("cdm", 0.5, 0, False),
        ("cdm k=5", 0.5, 3, False),
        ("sft", 1.0, 7, False),
        ("paper", 0.9, 7, False),
        ("cdm", 0.5, 7, False),
        ("cdm", 0.1, 0, True),
        ("cdm", 0.9, 0, True),
    ]


def test_a_cell_that_is_not_there(file: Path) -> None:
    study = from_file(str(file))
    assert cell_at(study, 8).in_curve
    for index in (-1, 9):
        with pytest.raises(BadOption, match=f"--cell is {index}; give 0 to 8"):
            cell_at(study, index)


def test_an_alpha_is_the_entrys_or_the_presets_or_the_studys(file: Path) -> None:
    study = from_file(str(file), ["alpha=0.3", "methods.mine={preset: paper, alpha: 0.2}"])
    assert [study.alpha_of(name) for name in ("sft", "paper", "mine", "cdm")] == [1.0, 0.9, 0.2, 0.3]


def test_a_preset_lies_under_the_entrys_own_settings(file: Path) -> None:
    study = from_file(
        str(file), ["methods.mine={preset: paper, max_edit_distance: 0.2, positions: boundary}"]
    )
    settings, _ = study.methods["mine"].resolved()
    assert (settings["max_edit_distance"], settings["positions"], settings["aligner"]) == (
        0.2,
        "boundary",
        "entropy-dtw",
    )
    assert study.methods["sft"].resolved() == ({}, 1.0)


def test_a_students_name_alone_is_a_model(file: Path) -> None:
    assert from_file(str(file), ["student=gpt2"]).student.words == "gpt2"
    assert from_file(str(file)).pair == "smollm2 → smollm2 with gpt2's tokenizer (6,000 entries)"
    fresh = from_file(str(file), ["student={size: 10m, tokenizer: mistral}"])
    assert fresh.student.words == "a fresh model of 10m with mistral's tokenizer"


def test_its_own_file_reads_back_the_same(file: Path) -> None:
    study = from_file(str(file), ["methods.cdm.alpha=0.4"])
    content = study.model_dump(mode="json", exclude_unset=True)
    assert StudyConfig.model_validate(yaml.safe_load(yaml.safe_dump(content))) == study
    assert study.name == "mine"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("sedes=[1]", "sedes is no setting, did you mean seeds?"),
        ("methods.cdm.topk=3", "methods.cdm.topk is no setting, did you mean top_k?"),
        ("methods.cdm.top_k=0", "methods.cdm.top_k is 0: give a number of at least 1"),
        ("methods.cdm.method=cmd", "did you mean cdm?"),
        ("methods.cdm.beta=0.4", "methods.cdm: cdm with mapping spelled has no use for beta"),
        ("methods.cdm.lr=1", "methods.cdm: lr: the cells of a study share data and steps"),
        ("methods.cdm.max_steps=1", "the cells of a study share"),
        ("methods.cdm.student=gpt2", "the cells of a study share"),
        ("methods.cdm.model=gpt2", "the cells of a study share"),
        ("methods.cdm.seed=1", "the cells of a study share"),
        ("methods.cdm.weight=2", "methods.cdm.weight is no setting"),
        ("methods.paper.preset=papre", "did you mean paper?"),
        ("methods.sft={alpha: 0.3}", "alpha has no use without a method"),
        ("methods.sft={max_edit_distance: 0.3}", "max_edit_distance is of a method: name it"),
        ("methods.a/b={method: em}", "'a/b' is no name for a file"),
        ("methods={}", "methods is {}: give at least 1 entries"),
        ("run.max_steps=3", "run.max_steps is the study's own: it has steps"),
        ("run.bucket=true", "run.bucket is the study's own"),
        ("run.lr=-1", "run.lr is -1: give a number above 0"),
        ("measures=[bits-per-bite, time, memory]", "did you mean bits-per-byte?"),
        ("measures=[bits-per-byte, divergence]", "time, memory cannot be left out"),
        ("inside.smus={path: x}", "unknown kind 'smus'; did you mean sums?"),
        ("outside.code={path: x}", "outside.code is trained on"),
        ("default=cdn", "default: unknown method 'cdn'; did you mean cdm?"),
        ("seeds=[1,1]", "seeds has 1 twice"),
        ("methods.cdm.seeds=[]", "methods.cdm.seeds is []: give at least 1 entries"),
        ("curves={cmd: [0.1]}", "curves: unknown method 'cmd'; did you mean cdm?"),
        ("curves={sft: [0.1]}", "curves.sft has no teacher"),
        ("curves={cdm: [0.5]}", "curves.cdm has 0.5 twice"),
        ("curves={cdm: [1.5]}", "curves.cdm.0 is 1.5: give a number of at most 1"),
        ("student={size: 3m, transplant: x, tokenizer: y}", "it has transplant and size"),
        ("student={size: 3m}", "size needs a tokenizer"),
        ("student={model: x, entries: 3}", "a model that is there has no use for entries"),
        ("train.sums.rows=0", "train.sums.rows is 0"),
        ("train.sums.pth=x", "train.sums.pth is no setting, did you mean path?"),
    ],
)
def test_a_fault_is_told(file: Path, assignment: str, said: str) -> None:
    message = faults(file, assignment)
    assert message.startswith(f"{file} has a fault: ")
    assert said in message


def test_all_faults_are_told_at_once(file: Path) -> None:
    message = faults(file, "sedes=[1]", "methods.cdm.beta=0.4", "methods.paper.lr=1", "steps=0", "run.lr=-1")
    assert "has 5 faults" in message
    message = faults(file, "default=cdn", "run.seed=1", "inside.x={path: y}", "curves={sft: [0.2]}")
    for word in ("default:", "run.seed", "inside.x", "curves.sft"):
        assert word in message


def test_no_text_to_measure_on(file: Path) -> None:
    assert "inside and outside are empty" in faults(file, "inside={}", "outside={}")


def test_studies_are_found_by_name_and_by_path(file: Path, tmp_path: Path) -> None:
    assert find_study(str(file)) == file
    with pytest.raises(FileProblem, match="there is no such file"):
        find_study(str(tmp_path / "none.yaml"))
    with pytest.raises(UnknownName, match="did you mean quickstart-small"):
        find_study("quikstart-small")


@pytest.mark.parametrize("shipped", list_studies(), ids=lambda shipped: shipped.name)
def test_each_shipped_study_is_without_fault(shipped) -> None:
    study = from_file(shipped.name)
    assert study.name == shipped.name
    assert study.about
    assert study.default in study.methods
    assert study.inside
    assert study.outside


def test_the_shipped_studies_are_these() -> None:
    assert {"quickstart-small", "transfer-small"} <= {shipped.name for shipped in list_studies()}
