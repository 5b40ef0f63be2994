"""Cells and studies, run with small models: equal work, equal figures, what is stopped, what fails."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cdm_toolkit.artifacts.code_fingerprint import code_fingerprint
from cdm_toolkit.compare import prepared as shared_module
from cdm_toolkit.compare import runner as run_module
from cdm_toolkit.compare.prepared import CODE, open_shared, prepare
from cdm_toolkit.compare.results import put_together, uneven
from cdm_toolkit.compare.runner import (
    TRAINED_BY,
    Running,
    cell_config,
    peak_memory,
    run_cell,
    run_study,
    running_cell,
)
from cdm_toolkit.compare.study import StudyConfig, from_file, grid
from cdm_toolkit.compare.study_folder import CELL_FILE, StudyFolder, is_held, only_one
from cdm_toolkit.compare.types import CellResult
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.errors import (
    BadArtifact,
    BadOption,
    BadSettings,
    FileProblem,
    Interrupted,
    SourceNotFound,
    UnknownName,
)

if TYPE_CHECKING:
    from preloaded import Started

STUDY: dict[str, Any] = {
    "train": {"sums": {"path": "sample:train", "rows": 6}, "code": {"path": "python:code", "rows": 2}},
    "inside": {"sums": {"path": "sample:heldout", "rows": 3}},
    "near": {"headers": {"path": "python:headers", "rows": 1, "split": "heldout"}},
    "outside": {"manual": {"path": "python:manual", "rows": 2}},
    "continuations": {"rows": 1, "new_tokens": 5},
    "max_length": 400,
    "steps": 3,
    "run": {"lr": 1e-3, "batch_size": 2},
    "default": "spelling",
    "methods": {
        "sft": {},
        "exact": {"method": "exact", "top_k": 20},
        "cdm": {"preset": "paper", "top_k": 20},
        "spelling": {"method": "spelling", "top_k": 20},
    },
}


@pytest.fixture(scope="module")
def make(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., StudyConfig]:
    """Give the function that makes a study of the small models, with assignments over it."""
    path = tmp_path_factory.mktemp("study") / "small.yaml"
    pair = {"teacher": str(small_models / "teacher"), "student": str(small_models / "student")}
    path.write_text(yaml.safe_dump(pair | STUDY, sort_keys=False), encoding="utf-8")
    return lambda *assignments: from_file(str(path), assignments)


@pytest.fixture(scope="module")
def study(make: Callable[..., StudyConfig]) -> StudyConfig:
    return make()


def claimed(study: StudyConfig, path: Path) -> StudyFolder:
    folder = StudyFolder(path)
    folder.claim(study)
    return folder


@pytest.fixture(scope="module")
def done(study: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """Run all cells of the study, in this process."""
    folder = claimed(study, tmp_path_factory.mktemp("done") / "out")
    for cell in grid(study):
        run_cell(study, folder, cell.index)
    return folder


@pytest.fixture
def copied(done: StudyFolder, tmp_path: Path) -> StudyFolder:
    shutil.copytree(done.path, tmp_path / "out")
    return StudyFolder(tmp_path / "out")


def figures(result: CellResult) -> CellResult:
    """Take what must be the same wherever a cell is run: not its costs, and not the paths among its settings."""
    return replace(result, step_seconds=0.0, peak_memory=0, settings={}, seconds={})


# A teacher that is trained first


def test_a_teacher_is_trained_on_the_rows_before_it_teaches(
    make: Callable[..., StudyConfig], done: StudyFolder, tmp_path: Path
) -> None:
    study = make(
        "teacher_run.lr=1e-2", "teacher_run.batch_size=2", "methods.sft={}", "methods.exact.top_k=20"
    )
    folder = claimed(study, tmp_path / "out")
    shared, plain = prepare(study, folder), open_shared(done)
    assert plain.teacher_model is None
    assert shared.teacher_model is not None
    assert shared.fingerprints["teacher"] != plain.fingerprints["teacher"]
    assert shared.fingerprints["student"] == plain.fingerprints["student"]
    assert shared.teacher.inside["sums"].bits < plain.teacher.inside["sums"].bits
    assert shared.start.inside["sums"].bits == plain.start.inside["sums"].bits
    settings = cell_config(study, shared, grid(study)[1], tmp_path / "cell")
    assert settings.teachers[0].model == shared.teacher_model
    assert run_cell(study, folder, 1).scores.inside["sums"].divergence > 0
    weights = Path(shared.teacher_model, "model.safetensors")
    before = weights.stat().st_mtime_ns
    assert open_shared(folder) is not None
    prepare(study, folder)
    assert weights.stat().st_mtime_ns == before
    assert "trained on the rows" in put_together(study, folder, command="cdm compare small").pair


def test_a_trained_teacher_is_checked(make: Callable[..., StudyConfig]) -> None:
    with pytest.raises(BadSettings, match=r"teacher_run\.max_steps is the study's own: it has steps"):
        make("teacher_run.max_steps=3")


# Cells


def test_cells_do_the_same_work(study: StudyConfig, done: StudyFolder) -> None:
    results = put_together(study, done, command="cdm compare small").cells
    assert [result.cell.method for result in results] == ["sft", "exact", "cdm", "spelling"]
    assert len({(result.steps, result.tokens) for result in results}) == 1
    assert uneven(results) == []
    for result in results:
        assert result.steps == 3
        assert result.step_seconds > 0
        assert [point.step for point in result.curve] == [1, 2, 3]
        assert result.scores.inside["sums"].scored_bytes > 100
        assert result.scores.near["headers"].words > 10
        assert result.scores.near["headers"].compared_bytes > 0
        assert [len(texts) for texts in result.scores.continuations.values()] == [1, 1, 1]
        assert result.scores.outside["manual"].boundaries > 100
    # the first step begins with the same weights and rows
    assert len({result.curve[0].ce for result in results}) == 1
    assert len({result.curve[2].ce for result in results}) == len(results)


def test_a_curve_has_what_the_method_has(study: StudyConfig, done: StudyFolder) -> None:
    sft, em, *_ = put_together(study, done, command="").cells
    assert all(point.kd is None and point.matched_mass is None for point in sft.curve)
    assert all(point.kd and 0 < point.matched_mass < 1 for point in em.curve)


def test_methods_read_the_cache_unless_they_need_the_model(study: StudyConfig, done: StudyFolder) -> None:
    shared = open_shared(done)
    by_name = {cell.method: cell_config(study, shared, cell, Path("out")) for cell in grid(study)}
    assert by_name["sft"].teachers == ()
    assert by_name["spelling"].teachers[0].cache == shared.cache
    assert by_name["cdm"].teachers[0].cache is None
    assert [by_name[name].alpha for name in ("exact", "cdm")] == [0.5, 0.9]


def test_what_comes_of_the_cache_is_what_the_model_gives(
    study: StudyConfig, done: StudyFolder, tmp_path
) -> None:
    from cdm_toolkit.distill.run import run

    cell = grid(study)[1]
    config = cell_config(study, open_shared(done), cell, tmp_path / "student")
    teacher = config.teachers[0].model_copy(update={"cache": None, "kind": "local"})
    online = run(config.model_copy(update={"teachers": (teacher,)}))
    stored = done.read_cell(study, cell)
    assert stored is not None
    for log, point in zip(online.losses, stored.result.curve, strict=True):
        assert point.kd == pytest.approx(log.teachers[0].kd, rel=1e-5)


def test_a_cell_run_again_gives_the_same_bits(study: StudyConfig, copied: StudyFolder) -> None:
    before = {cell.index: copied.read_cell(study, cell) for cell in grid(study)}
    for index in (0, 2, 3):
        again = run_cell(study, copied, index, overwrite=True)
        assert figures(again) == figures(before[index].result)


def test_a_finished_cell_is_read(study: StudyConfig, copied: StudyFolder, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(run_module, "_run", fail)
    assert run_cell(study, copied, 3) == copied.read_cell(study, grid(study)[3]).result


def test_weights_go_unless_they_are_to_stay(study: StudyConfig, copied: StudyFolder) -> None:
    assert not list(copied.path.glob("cells/**/*.safetensors"))
    run_cell(study, copied, 0, overwrite=True, keep_models=True)
    (model,) = copied.path.glob("cells/**/*.safetensors")
    assert model.parent == copied.of(grid(study)[0]) / "model"
    assert not list(copied.path.glob("cells/**/.scratch"))


def test_an_interrupted_cell_leaves_nothing(study: StudyConfig, copied: StudyFolder, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    cell = grid(study)[1]
    (copied.of(cell) / CELL_FILE).unlink()
    monkeypatch.setattr(run_module, "score", stop)
    with pytest.raises(Interrupted, match="cell 1 was stopped, nothing of it is kept; go on with: again"):
        run_cell(study, copied, 1, go_on="again")
    assert [path.name for path in copied.of(cell).iterdir()] == [".lock"]


def test_a_cell_that_runs_is_seen(study: StudyConfig, copied: StudyFolder) -> None:
    cell = grid(study)[2]
    progress = copied.of(cell) / "progress.json"
    with only_one(copied.of(cell), "runs it"):
        progress.write_text('["train", 2, 3]')
        assert running_cell(copied, cell) == Running(cell, "train", 2, 3)
        progress.write_text("")  # it is just being written
        assert running_cell(copied, cell) == Running(cell, "start", 0, 1)
    assert running_cell(copied, cell) is None


def test_peak_memory_is_this_process_alone() -> None:
    """`getrusage` of a child starts with its parent's, which has models in memory."""
    ballast = bytearray(300 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    line = "from cdm_toolkit.compare.runner import peak_memory as p; print(p('cpu'))"
    own = peak_memory("cpu")
    child = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert own > 300 << 20
    assert 20 << 20 < int(child.stdout) < own
    del ballast


# What cells share


def test_rows_that_some_side_would_cut_are_passed_over(
    make: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    study = make("max_length=110", "train.code.rows=1")
    shared = prepare(study, claimed(study, tmp_path / "out"))
    assert shared.counts == {"sums": 6, "code": 1}
    assert shared.passed_over > 0
    assert len(read_rows(shared.train)) == 7
    run_cell(study, StudyFolder(tmp_path / "out"), 0)
    facts = put_together(study, StudyFolder(tmp_path / "out"), command="x").facts
    assert "of more than 110 tokens" in facts["passed over"]


def test_too_few_rows_are_short_enough(make: Callable[..., StudyConfig], tmp_path: Path) -> None:
    study = make("max_length=12")
    with pytest.raises(BadOption, match=r"`train.sums.rows` is 6; give at most 0, or a longer max_length"):
        prepare(study, claimed(study, tmp_path / "out"))


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("train.more={path: none.jsonl}", "give the paths: `train.more.path`"),
        ("outside.more={path: none.jsonl}", "give the paths: `outside.more.path`"),
        ("train.sums.rows=100000", "`train.sums.rows` is 100000; give at most"),
        ("inside.sums.rows=100000", "`inside.sums.rows` is 100000; give at most"),
        ("outside.more={path: 'python:cod'}", "did you mean python:code?"),
        ("outside.more={path: 'python:code', rows: 3}", "2 of its 3 rows are trained on"),
        ("inside.code={path: 'python:code', rows: 4}", "2 of its 4 rows are trained on"),
        ("inside.sums.skip=100000", "`inside.sums.skip` is 100000; give less"),
        (
            (
                "curves={spelling: [0.8]}",
                "select_alpha_on={sums: {path: 'sample:heldout', skip: 2, rows: 2}}",
            ),
            "1 of its 2 rows are reported on; skip passes over these",
        ),
        ("student={transplant: none/such, tokenizer: gpt2}", "cannot find 'none/such'"),
        ("student={size: 3q, tokenizer: gpt2}", "`size` is '3q'"),
        ("student={size: 1m, tokenizer: gpt2, entries: 3}", "`entries` is 3"),
        ("teacher=none/such", "cannot find 'none/such'"),
        ("suites={mth: {limit: 2}}", "did you mean math?"),
    ],
)
def test_a_study_that_cannot_be_prepared(
    make: Callable[..., StudyConfig], tmp_path: Path, assignment: str | tuple[str, ...], said: str
) -> None:
    study = make(*((assignment,) if isinstance(assignment, str) else assignment))
    with pytest.raises((BadOption, FileProblem, SourceNotFound, UnknownName, BadArtifact)) as caught:
        prepare(study, claimed(study, tmp_path / "out"))
    assert said in str(caught.value)


def test_nothing_is_shared_with_a_study_without_a_teacher(make: Callable[..., StudyConfig], tmp_path) -> None:
    study = make("methods={sft: {}}", "default=sft", "measures=[bits-per-byte, time, memory]")
    shared = prepare(study, claimed(study, tmp_path / "out"))
    assert shared.cache is None
    assert shared.start.inside["sums"].boundaries == 0


def test_suites_score_teacher_student_and_cells(make: Callable[..., StudyConfig], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n' * 3, encoding="utf-8")
    study = make("methods={sft: {}}", "default=sft", f"suites={{bpb: {{data: {rows}, limit: 2}}}}")
    folder = claimed(study, tmp_path / "out")
    trained = run_cell(study, folder, 0).scores.suites
    shared = open_shared(folder)
    for suites in (shared.teacher.suites, shared.start.suites, trained):
        (score,) = suites["bpb"].values()
        assert score > 0
    assert trained["bpb"] != shared.start.suites["bpb"]
    assert put_together(study, folder, command="x").cells[0].scores.suites == trained


@pytest.mark.parametrize(
    "of",
    [
        "size: 200k",
        "transplant: TEACHER",
        "transplant: TEACHER, layers: 1, data: {path: 'sample:heldout', rows: 2}",
        "transplant: TEACHER, embeddings: omp, donor: DONOR",
    ],
)
def test_a_student_is_made_once(
    make: Callable[..., StudyConfig], small_models: Path, tmp_path: Path, of: str
) -> None:
    of = of.replace("TEACHER", str(small_models / "teacher")).replace("DONOR", str(small_models / "student"))
    alone = ("methods={sft: {}}", "default=sft", "measures=[bits-per-byte, time, memory]")
    study = make(f"student={{{of}, tokenizer: gpt2, entries: 700, seed: 5}}", *alone)
    folder = claimed(study, tmp_path / "out")
    shared = prepare(study, folder)
    assert shared.student == str(folder.shared / "student")
    moved = StudyFolder(shutil.copytree(folder.path, tmp_path / "moved"))
    assert open_shared(moved).student == str(moved.shared / "student")
    made = (folder.shared / "student" / "model.safetensors").stat().st_mtime_ns
    (folder.shared / "shared.json").unlink()  # stopped after it
    assert prepare(study, folder).fingerprints == shared.fingerprints
    assert (folder.shared / "student" / "model.safetensors").stat().st_mtime_ns == made


def test_alpha_is_chosen_on_other_rows(make: Callable[..., StudyConfig], tmp_path: Path) -> None:
    study = make(
        "methods={spelling: {method: spelling, top_k: 20}}",
        "curves={spelling: [0.9]}",
        "seeds=[0,1]",
        "select_alpha_on={sums: {path: 'sample:heldout', skip: 3, rows: 2}}",
    )
    folder = claimed(study, tmp_path / "out")
    for cell in grid(study):
        run_cell(study, folder, cell.index)
    result = put_together(study, folder, command="x")
    assert result.facts["held out, select alpha on"] == "sums (2 rows)"
    assert all(each.scores.select_alpha_on["sums"].scored_bytes > 100 for each in result.cells)
    own = [each.cell for each in result.cells if not each.cell.in_curve]
    assert sorted(cell.seed for cell in own) == [0, 1]
    assert len({cell.alpha for cell in own}) == 1


def test_a_study_that_has_grown_keeps_its_cells(
    make: Callable[..., StudyConfig], study: StudyConfig, copied: StudyFolder
) -> None:
    grown = make(
        "methods.early={method: em, top_k: 30}", "methods.wide={method: cdm, top_k: 150}", "seeds=[0,1]"
    )
    copied.claim(grown)
    cells = {(cell.method, cell.seed): cell for cell in grid(grown)}
    before = {cell.method: copied.read_cell(study, cell) for cell in grid(study)}
    for method, stored in before.items():
        assert copied.read_cell(grown, cells[method, 0]).result.scores == stored.result.scores
    assert copied.read_cell(grown, cells["exact", 1]) is None
    first = open_shared(copied).cache
    wide = run_cell(grown, copied, cells["wide", 0].index)
    assert open_shared(copied).cache == f"{first.removesuffix('-100')}-150"
    assert wide.settings["teachers"][0]["cache"] == open_shared(copied).cache
    again = run_cell(grown, copied, cells["spelling", 0].index, overwrite=True)  # from the wider cache now
    assert figures(again) == figures(replace(before["spelling"].result, cell=again.cell))


@pytest.mark.parametrize("replaced", ["teacher", "student"])
def test_a_model_that_was_replaced_is_told(
    study: StudyConfig, copied: StudyFolder, small_models: Path, monkeypatch, replaced: str
) -> None:
    other = small_models / "other"
    folder_of = shared_module.model_folder
    monkeypatch.setattr(
        shared_module,
        "model_folder",
        lambda name: other if name == str(small_models / replaced) else folder_of(name),
    )
    with pytest.raises(BadArtifact, match=f"the {replaced} changed since the study began; put back"):
        run_cell(study, copied, 1, overwrite=True)
    run_cell(study, copied, 1)  # what is finished is read


def test_suites_whose_data_changed_are_told(make: Callable[..., StudyConfig], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n', encoding="utf-8")
    study = make("methods={sft: {}}", "default=sft", f"suites={{bpb: {{data: {rows}}}}}")
    folder = claimed(study, tmp_path / "out")
    prepare(study, folder)
    rows.write_text('{"prompt": "1 + 2 = ", "completion": "3"}\n', encoding="utf-8")
    with pytest.raises(BadArtifact, match="the data of bpb changed since the study began"):
        run_cell(study, folder, 0)


def test_cells_of_other_sources_are_told(study: StudyConfig, copied: StudyFolder) -> None:
    file = copied.of(grid(study)[1]) / CELL_FILE
    content = json.loads(file.read_text())
    assert "code" not in put_together(study, copied, command="x").facts
    assert content["provenance"]["fingerprints"][CODE] == code_fingerprint(*TRAINED_BY)
    content["provenance"]["fingerprints"][CODE] = "0123456789"
    file.write_text(json.dumps(content))
    told = put_together(study, copied, command="x").facts["code"]
    assert told.startswith("not one version of this toolkit: ")
    assert "01234567 trained exact" in told


def test_a_teacher_speaks_when_a_method_first_asks(make: Callable[..., StudyConfig], tmp_path: Path) -> None:
    alone = make("methods={sft: {}}", "default=sft")
    folder = claimed(alone, tmp_path / "out")
    assert prepare(alone, folder).cache is None
    grown = make("methods={sft: {}, em: {method: em}}", "default=sft")
    folder.claim(grown)
    assert prepare(grown, folder).cache == str(folder.shared / "teacher-cache-100")


def test_a_folder_may_be_copied_to_another_machine(study: StudyConfig, copied: StudyFolder) -> None:
    shutil.move(copied.path, copied.path.with_name("moved"))
    moved = StudyFolder(copied.path.with_name("moved"))
    shared = open_shared(moved)
    assert shared.cache == str(moved.shared / "teacher-cache-100")
    run_cell(study, moved, 3, overwrite=True)


def test_what_was_altered_is_told(study: StudyConfig, copied: StudyFolder) -> None:
    rows = copied.shared / "train.jsonl"
    rows.write_text(rows.read_text().replace("?", "!"))
    with pytest.raises(BadArtifact, match="these are not the rows that were written; start the study anew"):
        run_cell(study, copied, 0, overwrite=True)
    (copied.shared / "shared.json").write_text("{}")
    with pytest.raises(BadArtifact, match="it is damaged"):
        prepare(study, copied)


def test_a_study_that_was_never_prepared(study: StudyConfig, tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="has not been prepared"):
        put_together(study, claimed(study, tmp_path / "out"), command="x")


# Put together


def test_a_cell_of_another_origin_is_told(study: StudyConfig, copied: StudyFolder) -> None:
    file = copied.of(grid(study)[2]) / CELL_FILE
    content = json.loads(file.read_text())
    content["provenance"]["fingerprints"]["training rows"] = "0"
    file.write_text(json.dumps(content))
    with pytest.raises(
        BadArtifact, match=r"another training rows than this study; run it again with `cell=2`"
    ):
        put_together(study, copied, command="x")


def test_unequal_work_is_told(study: StudyConfig, copied: StudyFolder) -> None:
    stored = copied.read_cell(study, grid(study)[1])
    copied.write_cell(replace(stored, result=replace(stored.result, tokens=7)))
    result = put_together(study, copied, command="x")
    (line,) = uneven(result.cells)
    tokens = f"{result.cells[0].tokens:,}"
    assert line == f"seed 0 has unequal tokens: {tokens} by sft, cdm, spelling; 7 by exact"
    assert result.facts["unequal work"] == line


def test_a_method_may_have_steps_of_its_own(make: Callable[..., StudyConfig], copied: StudyFolder) -> None:
    study = make("methods.twice={steps: 6}")
    result = put_together(study, copied, command="x")
    assert result.facts["steps"].startswith("3 of 2 rows (6 with twice), ")
    twice = run_cell(study, copied, [cell.method for cell in grid(study)].index("twice"))
    assert twice.steps == 6
    assert twice.tokens > result.cells[0].tokens
    (steps, tokens) = uneven(put_together(study, copied, command="x").cells)
    assert steps == "seed 0 has unequal steps: 3 by sft, exact, cdm, spelling; 6 by twice"
    assert tokens.startswith("seed 0 has unequal tokens")


def test_what_a_reader_must_know(study: StudyConfig, done: StudyFolder) -> None:
    result = put_together(study, done, command="cdm compare small.yaml")
    assert (
        list(result.facts)
        == [
            "trained on",
            "held out, inside",
            "held out, near",
            "held out, outside",
            "steps",
            "seeds",
            "machine",
            "notes",
            "command",
        ]
        or "passed over" in result.facts
    )
    assert result.facts["trained on"] == "sums (6 rows), code (2 rows)"
    assert result.facts["steps"].startswith("3 of 2 rows, ")
    assert result.planned == 4
    assert result.provenance["fingerprints"].keys() >= {
        "teacher",
        "student",
        "training rows",
        "held-out rows",
    }


# All cells, in processes of their own; `test_docs_kd` has one that is started as a user's


@pytest.mark.slow
@pytest.mark.usefixtures("cells_are_forked")
def test_a_study_runs_what_is_missing(
    make: Callable[..., StudyConfig], study: StudyConfig, copied: StudyFolder
) -> None:
    """A cell that fails does not stop the others, and neither does a study that grows change one that runs."""
    methods = {"kl": {"method": "kl"}, **STUDY["methods"]}
    more = make(f"methods={json.dumps(methods)}")
    kl, _, exact, _, spelling = cells = grid(more)
    before = {cell.method: copied.read_cell(study, cell) for cell in grid(study)}
    for cell in (exact, spelling):
        (copied.of(cell) / CELL_FILE).unlink()
    copied.claim(
        make(f"methods={json.dumps(methods)}", "methods.more={method: exact}", "methods.exact.top_k=5")
    )
    seen = []
    (failure,) = run_study(more, copied, workers=2, on_progress=seen.append)
    assert failure.cell == kl
    assert failure.why.startswith("the method of ")
    assert "give one for different tokenizers" in failure.why
    assert (seen[-1].done, seen[-1].planned) == (4, 5)
    assert {each.ended.cell.index for each in seen if each.ended} == {0, 2, 4}
    assert any(len(each.running) == 2 for each in seen)
    assert copied.read_cells(more, cells).keys() == set(cells) - {kl}
    for cell in (exact, spelling):
        stored = copied.read_cell(more, cell)
        alone = replace(before[cell.method].result, cell=cell)
        assert figures(stored.result) == figures(alone), "another process gives the same bits"
        assert cell.name in stored.provenance["command"]


@pytest.fixture
def started(start_module: Callable[..., Started]) -> Callable[..., Started]:
    """Give the function that goes on with a study in a process of its own, which forks those of cells."""
    return lambda folder, *words: start_module(
        "forked_cells", "compare", folder.study_file, "-o", folder.path, *words
    )


@pytest.mark.slow
def test_two_processes_prepare_at_once(
    started: Callable[..., Started], study: StudyConfig, done: StudyFolder, tmp_path: Path
) -> None:
    folder = claimed(study, tmp_path / "out")
    both = [started(folder, "--cell", str(index)) for index in (0, 3)]
    for process in both:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    for index in (0, 3):
        cell = grid(study)[index]
        assert figures(folder.read_cell(study, cell).result) == figures(done.read_cell(study, cell).result)


@pytest.fixture(scope="module")
def half_done(
    make: Callable[..., StudyConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[StudyConfig, StudyFolder]:
    """Run the first of two cells that are long enough to be stopped in."""
    study = make("steps=60", "methods={sft: {seeds: [0, 1]}}", "default=sft")
    folder = claimed(study, tmp_path_factory.mktemp("half") / "out")
    run_cell(study, folder, 0)
    return study, folder


@pytest.fixture
def second_cell(
    started: Callable[..., Started], half_done: tuple[StudyConfig, StudyFolder], tmp_path: Path
) -> tuple[StudyConfig, StudyFolder, Started]:
    """Go on with the study in a process, until the second cell trains."""
    study, done = half_done
    folder = StudyFolder(shutil.copytree(done.path, tmp_path / "out"))
    process = started(folder)
    while not (folder.of(grid(study)[1]) / "progress.json").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return study, folder, process


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(
    second_cell: tuple[StudyConfig, StudyFolder, Started],
) -> None:
    study, folder, process = second_cell
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert last == (
        f"cdm: the study was stopped, 1 of 2 cells are in {folder.path}; "
        f"go on with: cdm compare {folder.study_file} -o {folder.path}"
    )
    assert not list(folder.path.glob("cells/*/.scratch"))
    assert not is_held(folder.of(grid(study)[1])), "its process has ended too"


@pytest.mark.slow
@pytest.mark.usefixtures("cells_are_forked")
def test_a_killed_study_goes_on(
    second_cell: tuple[StudyConfig, StudyFolder, Started],
) -> None:
    """kill -9: a cell that has begun may still end by itself, and is waited for."""
    study, folder, process = second_cell
    process.kill()
    process.communicate()
    kept = (folder.of(grid(study)[0]) / CELL_FILE).stat().st_mtime_ns
    assert run_study(study, folder) == []
    assert len(put_together(study, folder, command="x").cells) == 2
    assert (folder.of(grid(study)[0]) / CELL_FILE).stat().st_mtime_ns == kept
