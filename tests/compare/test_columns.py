from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cdm_toolkit.compare.columns import Column, by_kind, overview, suites
from cdm_toolkit.compare.summary import summarize
from cdm_toolkit.compare.types import StudyResult

Make = Callable[..., StudyResult]


def columns_of(result: StudyResult) -> dict[tuple[str, str], Column]:
    return {(column.group, column.name): column for column in overview(result, summarize(result))}


def test_the_overview_has_shares_likelihood_divergence_and_cost(full_study: StudyResult) -> None:
    found = columns_of(full_study)
    assert [name for group, name in found if group == "share of the gap"] == ["inside", "outside", "mean"]
    assert [name for group, name in found if group == "cost"] == ["s a step", "MiB"]
    bits = found["bits per byte", "inside"]
    assert bits.end(bits.start) == "1.627"
    assert found["share of the gap", "mean"].end(1.0) == "1.000"
    assert found["cost", "MiB"].end(None) == "–"


def test_three_rings_and_all_measures_have_their_columns(with_near: StudyResult) -> None:
    found = columns_of(with_near)
    assert [name for group, name in found if group == "share of the gap"] == [
        "inside",
        "near",
        "outside",
        "mean",
    ]
    words = found["next word", "near"]
    assert (words.end(words.start), words.written(summarize(with_near).methods[0])) == ("0.400", "0.500")
    assert found["bits a digit", "inside"].written(summarize(with_near).methods[0]) == "2.000"
    assert found["next word", "outside"].end(found["next word", "outside"].start) == "–"
    assert "Next-word accuracy" in by_kind(with_near, summarize(with_near))


def test_the_best_is_the_highest_share_and_the_lowest_cost(full_study: StudyResult) -> None:
    methods = summarize(full_study).methods
    found = columns_of(full_study)
    assert found["share of the gap", "inside"].best(methods) == {"spelling"}
    assert found["cost", "s a step"].best(methods) == {"sft"}


def test_figures_that_read_the_same_are_best_together(make_study: Make) -> None:
    methods = summarize(make_study(("exact", "min-ed", "sft"))).methods
    tied = Column("", "", lambda method: replace(method.step_seconds, value=len(method.name) / 1e6), False)
    assert tied.best(methods) == {"exact", "min-ed", "sft"}
    assert tied.best(methods[:1]) == frozenset()


def test_a_side_without_a_gap_has_no_share_in_its_column(no_gap_outside: StudyResult) -> None:
    found = columns_of(no_gap_outside)
    method = summarize(no_gap_outside).methods[0]
    outside = found["share of the gap", "outside"]
    assert (outside.written(method), outside.end(outside.start), outside.end(outside.teacher)) == ("–",) * 3
    assert ("share of the gap", "mean") not in found
    assert outside.best(summarize(no_gap_outside).methods) == frozenset()


def test_deviations_are_left_out_on_demand(full_study: StudyResult) -> None:
    share = columns_of(full_study)["share of the gap", "mean"]
    method = summarize(full_study).methods[0]
    assert share.written(method) == "0.514 ± 0.008"
    assert share.written(method, spread=False) == "0.514"


def test_every_kind_has_its_column(full_study: StudyResult) -> None:
    for columns in by_kind(full_study, summarize(full_study)).values():
        assert [(column.group, column.name) for column in columns] == [
            ("inside", "word-problems"),
            ("inside", "gsm8k"),
            ("inside", "code"),
            ("outside", "manual"),
            ("outside", "headers"),
        ]


def test_suites_have_a_column_a_metric(make_study: Make) -> None:
    made = make_study(("sft",))
    measured = {"math": {"exact": 0.25}}
    made = replace(
        made,
        start=replace(made.start, suites=measured),
        teacher=replace(made.teacher, suites={"math": {"exact": 0.5}}),
        cells=tuple(replace(each, scores=replace(each.scores, suites=measured)) for each in made.cells),
    )
    (column,) = suites(made)
    assert (column.group, column.name, column.start, column.teacher) == ("math", "exact", 0.25, 0.5)
    assert column.written(summarize(made).methods[0]) == "0.250 ± 0.000"


def test_a_divergence_that_is_not_measured_has_no_column(no_divergence: StudyResult) -> None:
    found = columns_of(no_divergence)
    assert [name for group, name in found if group.startswith("KL")] == []
    assert list(by_kind(no_divergence, summarize(no_divergence))) == [
        "Share of the gap closed",
        "Bits per byte",
    ]
    assert summarize(no_divergence).methods[0].rings["inside"].divergence is None
