"""Alphas chosen on rows apart from those that are reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from cdm_toolkit.compare.best_alpha import at_best_alphas
from cdm_toolkit.compare.summary import summarize
from cdm_toolkit.compare.types import CellResult, Measured, ModelScores, StudyResult

Make = Callable[..., StudyResult]


def measured(bits_per_byte: float) -> Measured:
    return Measured(bits_per_byte * 100, 100, 0.0, 0)


@pytest.fixture
def chosen_on() -> Mapping[float, float]:
    """Give bits per byte by alpha on the rows to choose on: they order alphas otherwise than what is reported."""
    return {0.1: 1.7, 0.3: 1.5, 0.5: 1.6, 0.9: 1.8, 1.0: 1.9}


@pytest.fixture
def made(make_study: Make, chosen_on: Mapping[float, float]) -> StudyResult:
    study = make_study(("sft", "spelling", "gold"), curves={"spelling": (0.1, 0.3, 0.9), "gold": (0.9,)})
    cells = []
    for each in study.cells:
        for seed in (0, 1, 2) if each.cell.in_curve else (each.cell.seed,):
            cell = replace(each.cell, index=len(cells), seed=seed)
            cells.append(on(replace(each, cell=cell), chosen_on[each.cell.alpha]))
    ends = {"start": selection(study.start, 2.0), "teacher": selection(study.teacher, 1.0)}
    return replace(study, cells=tuple(cells), **ends)


def selection(scores: ModelScores, bits_per_byte: float) -> ModelScores:
    return replace(
        scores, select_alpha_on={"code": measured(bits_per_byte), "manual": measured(bits_per_byte)}
    )


def on(cell: CellResult, bits_per_byte: float) -> CellResult:
    return replace(cell, scores=selection(cell.scores, bits_per_byte))


def test_each_method_is_reported_at_the_alpha_that_is_best_elsewhere(made: StudyResult) -> None:
    found = summarize(at_best_alphas(made))
    methods = {method.name: method for method in found.methods}
    assert {name: {each.cell.alpha for each in method.cells} for name, method in methods.items()} == {
        "sft": {1.0},
        "spelling": {0.3},
        "gold": {0.5},
    }
    assert [each.cell.seed for each in methods["spelling"].cells] == [0, 1, 2]
    assert found.notes[0].startswith("each method at that of its alphas which does best on other rows: ")
    assert "spelling 0.3" in found.notes[0]


def test_a_line_has_the_first_seed_and_all_alphas(made: StudyResult) -> None:
    lines = {line.method: line for line in summarize(at_best_alphas(made)).lines}
    assert [(each.cell.seed, each.cell.alpha) for each in lines["spelling"].cells] == [
        (0, 0.1),
        (0, 0.3),
        (0, 0.5),
        (0, 0.9),
    ]
    assert [each.cell.alpha for each in lines["gold"].cells] == [0.5, 0.9]


def test_rings_count_alike_and_what_is_reported_does_not_count(made: StudyResult) -> None:
    """0.9 is best in the mean of the rings, though not by the bytes of both together."""
    cells = tuple(
        replace(
            each,
            scores=replace(
                each.scores,
                select_alpha_on={"code": measured(1.9), "manual": measured(1.0)}
                if each.cell.alpha == 0.9
                else {
                    "code": replace(measured(1.4), bits=1.4 * 900, scored_bytes=900),
                    "manual": measured(1.8),
                },
            ),
        )
        for each in made.cells
    )
    found = at_best_alphas(replace(made, cells=cells))
    assert {each.cell.alpha for each in found.cells if not each.cell.in_curve} == {0.9, 1.0}


def test_an_alpha_with_fewer_seeds_waits(made: StudyResult) -> None:
    early = tuple(each for each in made.cells if each.cell.alpha != 0.3 or each.cell.seed == 0)
    found = at_best_alphas(replace(made, cells=early))
    own = {
        each.cell.alpha for each in found.cells if each.cell.method == "spelling" and not each.cell.in_curve
    }
    assert own == {0.5}


def test_without_such_rows_nothing_changes(full_study: StudyResult, made: StudyResult) -> None:
    assert at_best_alphas(full_study) == full_study
    no_gap = replace(made, start=selection(made.start, 1.0))
    assert at_best_alphas(no_gap) == no_gap
