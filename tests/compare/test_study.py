"""Study files: what they may say, all that is wrong at once, and the cells that they come to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cdm_toolkit.compare.runner import cell_config
from cdm_toolkit.compare.study import StudyConfig, cell_at, find_study, from_file, grid, list_studies
from cdm_toolkit.errors import BadOption, BadSettings, FileProblem, UnknownName

STUDY: dict[str, Any] = {
    "teacher": "smollm2",
    "student": {"transplant": "smollm2", "tokenizer": "gpt2", "entries": 6000},
    "train": {"sums": {"path": "sample:train", "rows": 4}, "code": {"path": "python:code"}},
    "inside": {"sums": {"path": "sample:heldout", "rows": 2}},
    "outside": {"manual": {"path": "python:manual", "rows": 2}},
    "steps": 3,
    "seeds": [0, 7],
    "default": "spelling",
    "methods": {
        "sft": None,
        "cdm": {"preset": "paper"},
        "spelling": {"method": "spelling", "top_k": 20},
        "spelling k=5": {"method": "spelling", "top_k": 5, "seeds": [3]},
    },
    "curves": {"spelling": [0.9, 0.1]},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False), encoding="utf-8")
    return path


def faults(file: Path, *assignments: str) -> str:
    with pytest.raises(BadSettings) as caught:
        from_file(str(file), assignments)
    return str(caught.value)


def test_a_study_is_stopped_early_and_still_compares(file: Path) -> None:
    cells = grid(from_file(str(file)))
    assert [cell.index for cell in cells] == list(range(9))
    assert [(cell.method, cell.alpha, cell.seed, cell.in_curve) for cell in cells] == [
        ("sft", 1.0, 0, False),
        ("cdm", 0.9, 0, False),
        ("spelling", 0.5, 0, False),
        ("spelling k=5", 0.5, 3, False),
        ("sft", 1.0, 7, False),
        ("cdm", 0.9, 7, False),
        ("spelling", 0.5, 7, False),
        ("spelling", 0.1, 0, True),
        ("spelling", 0.9, 0, True),
    ]


def test_all_seeds_have_every_alpha_where_one_is_chosen(file: Path) -> None:
    study = from_file(str(file), ["select_alpha_on={sums: {path: 'sample:heldout', skip: 2, rows: 2}}"])
    assert [(cell.alpha, cell.seed) for cell in grid(study) if cell.in_curve] == [
        (0.1, 0),
        (0.9, 0),
        (0.1, 7),
        (0.9, 7),
    ]


def test_alphas_are_chosen_among_curves(file: Path) -> None:
    said = faults(file, "curves={}", "select_alpha_on={sums: {path: 'sample:heldout'}}")
    assert "select_alpha_on has nothing to choose from" in said


def test_a_cell_that_is_not_there(file: Path) -> None:
    study = from_file(str(file))
    assert cell_at(study, 8).in_curve
    for index in (-1, 9):
        with pytest.raises(BadOption, match=f"`cell` is {index}; give 0 to 8"):
            cell_at(study, index)


def test_an_alpha_is_the_entrys_or_the_presets_or_the_studys(file: Path) -> None:
    study = from_file(str(file), ["alpha=0.3", "methods.mine={preset: paper, alpha: 0.2}"])
    assert [study.alpha_of(name) for name in ("sft", "cdm", "mine", "spelling")] == [1.0, 0.9, 0.2, 0.3]


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
    smaller = from_file(str(file), ["student={transplant: smollm2, tokenizer: mistral, layers: 20}"])
    assert smaller.student.words == "smollm2 (20 layers) with mistral's tokenizer"


def test_its_own_file_reads_back_the_same(file: Path) -> None:
    study = from_file(str(file), ["methods.spelling.alpha=0.4"])
    content = study.model_dump(mode="json", exclude_unset=True)
    assert StudyConfig.model_validate(yaml.safe_load(yaml.safe_dump(content))) == study
    assert study.name == "mine"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("sedes=[1]", "sedes is no setting, did you mean seeds?"),
        ("methods.spelling.topk=3", "methods.spelling.topk is no setting, did you mean top_k?"),
        ("methods.spelling.top_k=0", "methods.spelling.top_k is 0: give a number of at least 1"),
        ("methods.spelling.method=spellin", "did you mean spelling?"),
        ("methods.spelling.tau=0.4", "methods.spelling.tau is of no use to spelling"),
        (
            "methods.spelling.lr=1",
            "methods.spelling: lr: the cells of a study share data, teacher and student",
        ),
        ("methods.spelling.max_steps=1", "the cells of a study share"),
        ("methods.spelling.student=gpt2", "the cells of a study share"),
        ("methods.spelling.model=gpt2", "the cells of a study share"),
        ("methods.spelling.steps=0", "methods.spelling.steps is 0: give a number of at least 1"),
        ("methods.spelling.seed=1", "the cells of a study share"),
        ("methods.spelling.weight=2", "methods.spelling.weight is no setting of a study"),
        ("methods.cdm.preset=papre", "did you mean paper?"),
        ("methods.sft={alpha: 0.3}", "alpha has no use without a method"),
        ("methods.sft={max_edit_distance: 0.3}", "max_edit_distance is of a method: name it"),
        ("methods.a/b={method: exact}", "'a/b' is no name for a file"),
        ("methods={}", "methods is {}: give at least 1 entries"),
        ("run.max_steps=3", "run.max_steps is the study's own: it has steps"),
        ("run.group_by_length=true", "run.group_by_length is the study's own"),
        ("run.lr=-1", "run.lr is -1: give a number above 0"),
        ("measures=[bits-per-bite, time, memory]", "did you mean bits-per-byte?"),
        ("measures=[bits-per-byte, divergence]", "time, memory cannot be left out"),
        ("inside.smus={path: x}", "unknown kind 'smus'; did you mean sums?"),
        ("outside.code={path: x}", "outside.code is trained on"),
        ("select_alpha_on={smus: {path: x}}", "select_alpha_on.smus is not held out: unknown kind 'smus'"),
        ("train.sums.skip=-1", "train.sums.skip is -1"),
        ("near.code={path: x}", "near.code is trained on"),
        ("near.manual={path: x}", "near.manual is outside as well"),
        ("default=spel", "default: unknown method 'spel'; did you mean spelling?"),
        ("seeds=[1,1]", "seeds has 1 twice"),
        ("methods.spelling.seeds=[]", "methods.spelling.seeds is []: give at least 1 entries"),
        ("curves={spel: [0.1]}", "curves: unknown method 'spel'; did you mean spelling?"),
        ("curves={sft: [0.1]}", "curves.sft has no teacher"),
        ("curves={spelling: [0.5]}", "curves.spelling has 0.5 twice"),
        ("curves={spelling: [1.5]}", "curves.spelling.0 is 1.5: give a number of at most 1"),
        ("student={size: 3m, transplant: x, tokenizer: y}", "it has transplant and size"),
        ("student={size: 3m}", "size needs a tokenizer"),
        ("student={size: 3m, tokenizer: y, layers: 2}", "a fresh model has no use for layers"),
        ("student={transplant: x}", "transplant needs a tokenizer, a donor or a number"),
        ("student={transplant: x, tokenizer: y, embeddings: omp}", "omp and a donor go together"),
        ("student={model: x, donor: y}", "no use for donor"),
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
    message = faults(
        file, "sedes=[1]", "methods.spelling.tau=0.4", "methods.cdm.lr=1", "steps=0", "run.lr=-1"
    )
    assert "has 5 faults" in message
    message = faults(file, "default=spel", "run.seed=1", "inside.x={path: y}", "curves={sft: [0.2]}")
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


@pytest.mark.parametrize("shipped", list_studies())
def test_each_shipped_study_is_without_fault(shipped: str) -> None:
    study = from_file(shipped)
    assert study.name == shipped
    assert study.about
    assert study.default in study.methods
    assert study.inside
    assert study.outside


def test_the_shipped_studies_are_these() -> None:
    assert {"quickstart-small", "transfer-small", "transfer-epoch"} <= list_studies().keys()


def test_a_method_may_be_on_policy(file: Path, tmp_path: Path) -> None:
    """Its teacher is then in memory, though the others read a cache; the rest of the run is the same."""
    more = {"method": "spelling", "divergence": "reverse-kl", "on_policy": {"share": 1, "max_new_tokens": 8}}
    methods = STUDY["methods"] | {"on-policy": more}
    file.write_text(yaml.safe_dump(STUDY | {"methods": methods}, sort_keys=False), encoding="utf-8")
    study = from_file(str(file))
    entry = study.methods["on-policy"]
    assert not entry.uses_cache
    assert study.methods["spelling"].uses_cache
    assert entry.options()["on_policy"]["max_new_tokens"] == 8
    assert "on_policy" not in entry.default_options() | study.methods["spelling"].options()
    shared: Any = SimpleNamespace(
        student="smollm2", train=tmp_path / "rows", teacher_model=None, cache="cache"
    )
    one, other = (
        cell_config(study, shared, cell_at(study, f"{name}-alpha0.5-seed0"), tmp_path)
        for name in ("on-policy", "spelling")
    )
    assert one.on_policy is not None
    assert one.on_policy.share == 1
    assert (one.teachers[0].cache, other.teachers[0].cache) == (None, "cache")
    assert other.on_policy is None
    assert one.train == other.train


def test_what_is_on_policy_needs_a_method(file: Path) -> None:
    said = faults(file, "methods.sft.on_policy.share=1")
    assert "on_policy has no use without a method: nobody judges the samples" in said
    said = faults(file, "methods.spelling.on_policy.shares=1")
    assert "shares is no setting, did you mean share?" in said
