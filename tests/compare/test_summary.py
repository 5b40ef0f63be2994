from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.compare.summary import Summary, _front, results_record, summarize
from cdm_toolkit.compare.table import Gap, Mean
from cdm_toolkit.compare.types import Cell, CellResult, Measured, ModelScores, StudyResult
from cdm_toolkit.compare.verdicts import Verdict

Make = Callable[..., StudyResult]


def measured(bits_per_byte: float, size: int = 1000, divergence: float = 0.5) -> Measured:
    return Measured(bits_per_byte * size, size, divergence * 100, 100)


def scores(inside: Mapping[str, Measured], outside: Mapping[str, Measured]) -> ModelScores:
    return ModelScores(inside, outside, {})


def cell(
    method: str, inside: Mapping[str, Measured], outside: Mapping[str, Measured], seed: int
) -> CellResult:
    return CellResult(Cell(seed, method, 0.5, seed), scores(inside, outside), 1, 1, 1.0 + seed, 2**20, (), {})


def small_study(cells: Sequence[CellResult], *, teacher_outside: float = 1.0) -> StudyResult:
    start = scores({"a": measured(2.0), "b": measured(4.0, size=3000)}, {"c": measured(2.0)})
    teacher = scores({"a": measured(1.0), "b": measured(2.0, size=3000)}, {"c": measured(teacher_outside)})
    methods = tuple(dict.fromkeys(each.cell.method for each in cells))
    return StudyResult("s", "", "t → s", None, teacher, start, tuple(cells), methods, len(cells), {}, {})


def mean(found: Summary, method: str, measure: str, name: str, kind: str | None = None) -> Mean | None:
    """Look a figure up in the table."""
    (column,) = (
        each for each in found.table if (each.measure, each.name, each.kind) == (measure, name, kind)
    )
    return column.means.get(method)


# Means and shares


def test_a_mean_has_the_deviation_of_a_sample() -> None:
    found = Mean.of([1.0, 2.0, 6.0])
    assert (found.value, found.runs) == (3.0, 3)
    assert found.std == pytest.approx(sqrt((4 + 1 + 9) / 2))
    assert found.written(2) == "3.00 ± 2.65"


def test_one_run_has_no_deviation() -> None:
    assert Mean.of([1.5]) == Mean(1.5, None, 1)
    assert Mean.of([1.5]).written(1) == "1.5"


def test_the_share_of_a_gap_is_0_at_the_start_and_1_at_the_teacher() -> None:
    gap = Gap(start=2.0, teacher=1.5)
    assert [gap.share(bits) for bits in (2.0, 1.5, 1.75, 2.5)] == [0.0, 1.0, 0.5, -1.0]


@pytest.mark.parametrize("teacher", [2.0, 2.5])
def test_a_start_as_good_as_the_teacher_leaves_no_share(teacher: float) -> None:
    assert Gap(start=2.0, teacher=teacher).share(1.0) is None


def test_kinds_count_by_their_bytes_and_seeds_alike() -> None:
    cells = [
        cell("m", {"a": measured(1.5), "b": measured(3.0, size=3000)}, {"c": measured(1.25)}, 0),
        cell("m", {"a": measured(1.5), "b": measured(3.5, size=3000)}, {"c": measured(1.75)}, 1),
    ]
    found = summarize(small_study(cells))
    (method,) = found.methods
    bits, inside = (mean(found, "m", measure, "inside") for measure in ("bits per byte", "share of the gap"))
    # (1.5·1 + 3·3) / 4 and (1.5·1 + 3.5·3) / 4, between 3.5 and 1.75
    assert bits is not None
    assert bits.value == pytest.approx((2.625 + 3.0) / 2)
    assert inside is not None
    assert inside.value == pytest.approx((0.5 + 2 / 7) / 2)
    assert mean(found, "m", "share of the gap", "outside") == Mean(0.5, pytest.approx(sqrt(0.125)), 2)
    assert method.score is not None
    assert method.score.value == pytest.approx(((0.5 + 0.75) / 2 + (2 / 7 + 0.25) / 2) / 2)
    assert mean(found, "m", "share of the gap", "mean") == method.score
    assert mean(found, "m", "share of the gap", "inside", "b") == Mean(0.375, pytest.approx(sqrt(0.03125)), 2)
    assert mean(found, "m", "cost", "s a step") == Mean(1.5, pytest.approx(sqrt(0.5)), 2)
    assert mean(found, "m", "KL, nats", "inside") == Mean(0.5, 0.0, 2)


def test_no_gap_outside_is_said_and_methods_are_judged_by_the_other_side(no_gap_outside: StudyResult) -> None:
    found = summarize(no_gap_outside)
    assert "outside: the student is no worse than the teacher before training" in found.notes[0]
    assert found.notes[0].endswith("Methods are judged by their share inside.")
    assert found.score_name == "share inside"
    for method in found.methods:
        assert mean(found, method.name, "share of the gap", "outside") is None
        assert method.score == mean(found, method.name, "share of the gap", "inside")
    assert [verdict.other for verdict in found.verdicts if verdict.ahead] == ["exact", "sft"]


def test_without_any_gap_nothing_is_judged(no_gap_outside: StudyResult) -> None:
    start = replace(no_gap_outside.start, inside=no_gap_outside.teacher.inside)
    found = summarize(replace(no_gap_outside, start=start))
    assert [method.score for method in found.methods] == [None, None, None]
    assert found.verdicts == ()
    assert found.headline.endswith("there is no gap to close.")
    assert all(note.endswith("Methods cannot be judged by it.") for note in found.notes)
    assert [method.name for method in found.methods] == ["sft", "exact", "spelling"]


def test_a_kind_without_a_gap_is_named(make_study: Make) -> None:
    made = make_study(("sft", "spelling"))
    start = replace(made.start, outside={**made.start.outside, "manual": made.teacher.outside["manual"]})
    found = summarize(replace(made, start=start))
    assert [note.split(":")[0] for note in found.notes] == ["outside, manual"]
    best = found.methods[0].name
    assert mean(found, best, "share of the gap", "outside", "manual") is None
    assert mean(found, best, "share of the gap", "outside", "headers") is not None


def test_a_study_without_text_outside_has_one_side(make_study: Make) -> None:
    made = make_study(("sft", "spelling"))
    no_outside = {"start": replace(made.start, outside={}), "teacher": replace(made.teacher, outside={})}
    cells = tuple(replace(each, scores=replace(each.scores, outside={})) for each in made.cells)
    found = summarize(replace(made, cells=cells, **no_outside))
    assert list(found.gaps) == ["inside"]
    assert found.score_name == "share inside"
    assert found.notes == ()


def test_three_rings_are_averaged_and_the_front_is_that_of_the_plane(
    make_study: Make, with_near: StudyResult
) -> None:
    before, after = summarize(make_study(("sft", "exact", "spelling"))), summarize(with_near)
    assert list(after.gaps) == ["inside", "near", "outside"]
    for method in after.methods:
        inside, near, outside = (
            mean(after, method.name, "share of the gap", ring) for ring in ("inside", "near", "outside")
        )
        assert near == inside
        assert inside is not None
        assert outside is not None
        assert method.score is not None
        assert method.score.value == pytest.approx((2 * inside.value + outside.value) / 3)
    assert {m.name for m in after.methods if m.on_front} == {m.name for m in before.methods if m.on_front}


def test_no_gap_in_one_of_three_rings_leaves_two(with_near: StudyResult) -> None:
    start = replace(with_near.start, outside=with_near.teacher.outside)
    found = summarize(replace(with_near, start=start))
    assert found.notes[0].endswith("Methods are judged by their share inside and near.")
    assert found.score_name == "mean of shares"


def test_words_and_digits_are_averaged_where_all_runs_have_them(with_near: StudyResult) -> None:
    found = summarize(with_near)
    best = found.methods[0].name
    assert mean(found, best, "next word", "inside") == Mean(pytest.approx(0.5), pytest.approx(0.1), 3)
    assert mean(found, best, "bits a digit", "near") == Mean(2.0, 0.0, 3)
    assert mean(found, best, "next word", "outside") is None
    first = with_near.cells[0]
    old = {kind: replace(each, words=0) for kind, each in first.scores.near.items()}
    cells = (replace(first, scores=replace(first.scores, near=old)), *with_near.cells[1:])
    partly = summarize(replace(with_near, cells=cells))
    assert mean(partly, "sft", "next word", "near") is None
    assert mean(partly, "spelling", "next word", "near") is not None


def test_methods_come_best_first(full_study: StudyResult) -> None:
    found = summarize(full_study).methods
    values = [method.score.value for method in found if method.score]
    assert values == sorted(values, reverse=True)
    assert found[0].name == "spelling"
    assert found[-1].name == "sft"


def test_suites_and_matched_mass_are_averaged(make_study: Make) -> None:
    made = make_study(("sft", "spelling"))
    cells = tuple(
        replace(each, scores=replace(each.scores, suites={"math": {"exact": float(each.cell.seed)}}))
        for each in made.cells
    )
    start = replace(made.start, suites={"math": {"exact": 0.0}})
    found = summarize(replace(made, cells=cells, start=start))
    assert mean(found, "spelling", "math", "exact") == Mean(1.0, 1.0, 3)
    assert mean(found, "sft", "cost", "matched mass") is None
    mass = mean(found, "spelling", "cost", "matched mass")
    assert mass is not None
    assert mass.value == pytest.approx(0.93, abs=0.005)


# Lines over alpha


def test_lines_have_the_own_cell_of_their_seed_and_leave_the_means_alone(full_study: StudyResult) -> None:
    found = summarize(full_study)
    lines = {line.method: line for line in found.lines}
    assert set(lines) == {"gold", "spelling"}
    assert [each.cell.alpha for each in lines["spelling"].cells] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert {each.cell.seed for each in lines["spelling"].cells} == {0}
    assert [each.cell.seed for each in found.methods[0].cells] == [0, 1, 2]
    assert {each.cell.alpha for each in found.methods[0].cells} == {0.5}


def test_a_line_is_drawn_before_its_method_is_there(full_study: StudyResult) -> None:
    only = tuple(each for each in full_study.cells if each.cell.in_curve)
    found = summarize(replace(full_study, cells=only))
    assert found.methods == ()
    assert [len(line.cells) for line in found.lines] == [4, 4]


# The front


def test_the_front_has_whom_nobody_dominates() -> None:
    places = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (3.0, 1.0), "d": (2.0, 2.5), "e": (3.0, 3.0)}
    assert _front(places) == {"a", "b", "c"}


def test_equals_are_on_the_front_together() -> None:
    assert _front({"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (1.0, 2.0)}) == {"a", "b"}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8))
def test_every_method_off_the_front_is_dominated_from_the_front(points: list[tuple[int, int]]) -> None:
    places = {f"{i}": (float(x), float(y)) for i, (x, y) in enumerate(points)}
    front = _front(places)
    assert front

    def dominates(a: str, b: str) -> bool:
        return places[a] != places[b] and all(x <= y for x, y in zip(places[a], places[b], strict=True))

    assert all(any(dominates(a, b) for a in front) == (b not in front) for b in places)


# Words


def test_the_headline_counts_the_verdicts(full_study: StudyResult) -> None:
    found = summarize(full_study)
    assert found.headline == "spelling beats 8 of 10 methods, is behind none; no difference is shown to 2."
    assert [verdict.other for verdict in found.verdicts] == [method.name for method in found.methods[1:]]
    assert all(isinstance(verdict, Verdict) and verdict.default == "spelling" for verdict in found.verdicts)


def test_a_default_that_beats_nobody_is_told_so(make_study: Make) -> None:
    assert (
        summarize(make_study(("exact", "spelling"), default="exact")).headline
        == "exact beats none of 1 methods, is behind 1."
    )


def test_without_a_default_the_best_is_named(make_study: Make) -> None:
    found = summarize(make_study(("exact", "spelling"), default=None))
    assert found.verdicts == ()
    assert found.headline.startswith("spelling closes most of the gap: 0.5")


def test_a_default_that_is_still_to_come_is_said(make_study: Make) -> None:
    found = summarize(make_study(("exact", "sft")))
    assert found.verdicts == ()
    assert found.headline == "spelling, which the others are to be compared with, has not been measured yet."


def test_a_study_in_progress_says_so(make_study: Make) -> None:
    made = make_study(("exact", "spelling"))
    found = summarize(replace(made, cells=made.cells[:2]))
    assert found.notes == ("2 of 6 cells are measured: means and verdicts may change.",)


def test_a_study_without_cells_is_a_summary_too(make_study: Make) -> None:
    found = summarize(replace(make_study(("exact", "spelling")), cells=()))
    assert found.methods == ()
    assert found.headline == "No method has been measured yet."


def test_the_record_has_the_figures_of_the_table_and_what_they_say(full_study: StudyResult) -> None:
    import json

    record = json.loads(json.dumps(results_record(full_study)))
    assert len(record["cells"]) == len(full_study.cells)
    found = summarize(full_study)
    assert record["headline"] == found.headline
    assert [each["other"] for each in record["verdicts"]] == [each.other for each in found.verdicts]
    (share,) = (
        each for each in record["table"] if (each["measure"], each["name"]) == ("share of the gap", "mean")
    )
    assert share["means"]["spelling"] == {
        "value": found.methods[0].score.value,
        "std": pytest.approx(0.0079, abs=1e-3),
        "runs": 3,
    }
    assert (share["start"], share["teacher"]) == (0.0, 1.0)
