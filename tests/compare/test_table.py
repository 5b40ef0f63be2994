from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cdm_toolkit.compare.summary import Summary, summarize
from cdm_toolkit.compare.table import MEASURES, Column, Mean
from cdm_toolkit.compare.types import StudyResult

Make = Callable[..., StudyResult]


def columns_of(result: StudyResult) -> dict[tuple[str, str], Column]:
    return {(column.measure, column.name): column for column in summarize(result).columns("text", "cost")}


def by_kind(summary: Summary) -> dict[str, tuple[Column, ...]]:
    found = {measure.title: summary.by_kind(measure.name) for measure in MEASURES}
    return {title: columns for title, columns in found.items() if columns}


def test_the_overview_has_shares_likelihood_divergence_and_cost(full_study: StudyResult) -> None:
    found = columns_of(full_study)
    assert [name for group, name in found if group == "share of the gap"] == ["inside", "outside", "mean"]
    assert [name for group, name in found if group == "cost"] == ["s a step", "MiB", "matched mass"]
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
    assert (words.end(words.start), words.written(summarize(with_near).methods[0].name)) == (
        "0.400",
        "0.500 ± 0.100",
    )
    assert found["bits a digit", "inside"].written(summarize(with_near).methods[0].name) == "2.000 ± 0.000"
    assert found["next word", "outside"].end(found["next word", "outside"].start) == "–"
    assert "Next-word accuracy" in by_kind(summarize(with_near))


def test_the_best_is_the_highest_share_and_the_lowest_cost(full_study: StudyResult) -> None:
    found = columns_of(full_study)
    assert found["share of the gap", "inside"].best == {"spelling"}
    assert found["cost", "s a step"].best == {"sft"}
    assert found["cost", "matched mass"].best == frozenset()


def test_figures_that_read_the_same_are_best_together() -> None:
    means = {name: Mean(0.5 + len(name) / 1e6, None, 1) for name in ("exact", "min-ed", "sft")}
    assert Column("cost", "", "", None, False, means).best == {"exact", "min-ed", "sft"}
    assert Column("cost", "", "", None, False, {"sft": means["sft"]}).best == frozenset()


def test_a_side_without_a_gap_has_no_share_in_its_column(no_gap_outside: StudyResult) -> None:
    found = columns_of(no_gap_outside)
    method = summarize(no_gap_outside).methods[0].name
    outside = found["share of the gap", "outside"]
    assert (outside.written(method), outside.end(outside.start), outside.end(outside.teacher)) == ("–",) * 3
    assert ("share of the gap", "mean") not in found
    assert outside.best == frozenset()


def test_deviations_are_left_out_on_demand(full_study: StudyResult) -> None:
    share = columns_of(full_study)["share of the gap", "mean"]
    method = summarize(full_study).methods[0].name
    assert share.written(method) == "0.514 ± 0.008"
    assert share.written(method, spread=False) == "0.514"


def test_every_kind_has_its_column(full_study: StudyResult) -> None:
    for columns in by_kind(summarize(full_study)).values():
        assert [column.heads for column in columns] == [
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
    (column,) = summarize(made).columns("suites")
    assert (*column.heads, column.start, column.teacher) == ("math", "exact", 0.25, 0.5)
    assert column.written("sft") == "0.250 ± 0.000"


def test_a_divergence_that_is_not_measured_has_no_column(no_divergence: StudyResult) -> None:
    found = columns_of(no_divergence)
    assert [name for group, name in found if group.startswith("KL")] == []
    assert list(by_kind(summarize(no_divergence))) == [
        "Share of the gap closed",
        "Bits per byte",
    ]


def test_the_teacher_has_no_divergence_from_itself(with_near: StudyResult) -> None:
    """No boundary of its own is measured."""
    teacher = {kind: replace(each, boundaries=0) for kind, each in with_near.teacher.inside.items()}
    found = columns_of(replace(with_near, teacher=replace(with_near.teacher, inside=teacher)))
    assert found["KL, nats", "inside"].teacher == 0.0


def test_continuations_have_their_own_part(with_near: StudyResult, full_study: StudyResult) -> None:
    found = {column.heads: column for column in summarize(with_near).columns("continuations")}
    assert list(dict.fromkeys(measure for measure, _ in found)) == [
        "agreement with the teacher",
        "repetition",
    ]
    assert found["agreement with the teacher", "inside"].written("spelling") == "0.617 ± 0.126"
    assert summarize(full_study).columns("continuations") == ()


def test_sampling_has_a_cost_where_a_method_is_on_policy(full_study: StudyResult) -> None:
    seconds = {"teacher": 0.3, "student": 0.5}
    cells = tuple(
        replace(
            cell,
            teacher_tokens=20_000,
            seconds=seconds | {"sampling": 0.25 if cell.cell.method == "spelling" else 0.0},
        )
        for cell in full_study.cells
    )
    found = columns_of(replace(full_study, cells=cells))
    assert found["cost", "s a step, sampling"].means["spelling"].value == 0.25
    assert found["cost", "s a step, sampling"].means["sft"].value == 0
    assert found["cost", "s a step, teacher"].means["sft"].value == 0.3
    assert found["cost", "student's tokens"].means["sft"].value == 17_342
    assert found["cost", "teacher's tokens"].written("spelling", spread=False) == "20,000"
