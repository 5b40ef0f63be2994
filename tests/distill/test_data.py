"""Features of rows: labels, groups, cuts and counts, with real tokenizers."""

from __future__ import annotations

import numpy as np
import pytest

from cdm_toolkit.distill.data import Features, RowCounts, Side, build_features
from cdm_toolkit.distill.rows import Row
from cdm_toolkit.tokdiff.view import TokenizerView

PAIRS = [("smollm2", "mistral"), ("mistral", "smollm2"), ("gpt2", "mistral"), ("smollm2", "smollm2")]


def id_of(view: TokenizerView, role: str) -> int | None:
    return min((token.id for token in view.special.values() if role in token.roles), default=None)


def side(view: TokenizerView) -> Side:
    bos, eos = id_of(view, "bos"), id_of(view, "eos")
    return Side(view, eos if bos is None else bos, eos)


def spelled(view: TokenizerView, ids: np.ndarray) -> bytes:
    return b"".join(view.token_bytes[i] or b"" for i in ids)


@pytest.fixture(params=PAIRS, ids="-".join)
def sides(request: pytest.FixtureRequest, real_view) -> tuple[Side, Side]:
    """Give student and teacher."""
    teacher, student = request.param
    return side(real_view(student)), side(real_view(teacher))


@pytest.fixture
def rows(gsm8k_rows: list[dict[str, str]]) -> list[Row]:
    return [Row(i, row["question"], row["answer"]) for i, row in enumerate(gsm8k_rows[:40], 1)]


def check_groups(row: Row, features: Features, student: Side, teacher: Side) -> None:
    """See that what stands before each group, and the group itself, is the same text on both sides."""
    completion = row.text.encode()[row.completion_start :]
    before_t = before_s = b""
    for t0, t1, s0, s1 in features.groups:
        assert s0 >= max(features.label_from, 1)
        assert t0 >= 1
        before_t, before_s = (
            spelled(teacher.view, features.teacher_ids[:t0]),
            spelled(student.view, features.student_ids[:s0]),
        )
        assert before_t.lstrip() == before_s.lstrip()
        assert spelled(teacher.view, features.teacher_ids[t0:t1]) == spelled(
            student.view, features.student_ids[s0:s1]
        )
    assert completion.startswith(before_s.lstrip()[row.completion_start :])


def test_labels_spell_the_completion_and_groups_share_their_context(
    sides: tuple[Side, Side], rows: list[Row]
) -> None:
    student, teacher = sides
    features, counts = build_features(rows, student, teacher, max_length=1024)
    assert counts == RowCounts(read=40, trained=40)
    for row, one in zip(rows, features, strict=True):
        assert one.row == row.number
        labels = one.student_ids[one.label_from :]
        assert labels[-1] == student.eos
        assert spelled(student.view, labels).decode() == row.completion
        assert spelled(teacher.view, one.teacher_ids).decode().lstrip() == row.text
        check_groups(row, one, student, teacher)
        assert (one.groups[0][2], one.groups[-1][2]) == (one.label_from, len(one.student_ids) - 1)
        assert one.groups[-1][0] == len(one.teacher_ids) - 1, "the ends of both sides are a group"


@pytest.mark.parametrize("max_length", [60, 120, 180])
def test_long_rows_are_cut_at_a_shared_boundary(
    sides: tuple[Side, Side], rows: list[Row], max_length: int
) -> None:
    student, teacher = sides
    features, counts = build_features(rows, student, teacher, max_length=max_length)
    assert counts.read == 40 == counts.trained + counts.too_long
    assert counts.cut > 0
    by_number = {row.number: row for row in rows}
    for one in features:
        assert max(len(one.student_ids), len(one.teacher_ids)) <= max_length
        texts = [
            spelled(s.view, ids).lstrip()
            for s, ids in ((student, one.student_ids), (teacher, one.teacher_ids))
        ]
        assert texts[0] == texts[1], "both sides end at the same byte"
        assert by_number[one.row].text.encode().startswith(texts[0])
        check_groups(by_number[one.row], one, student, teacher)


def test_a_text_is_learned_from_its_first_token(sides: tuple[Side, Side]) -> None:
    student, teacher = sides
    (one,), _ = build_features([Row(1, "", "Two cats sit.")], student, teacher)
    assert one.label_from == 1
    assert one.groups[0].tolist()[::2] == [1, 1]


def test_a_token_that_straddles_the_boundary_is_no_label(real_view) -> None:
    student, teacher = side(real_view("gpt2")), side(real_view("smollm2"))
    row = Row(1, "x", "\n\n\n  deep")  # the prompt's line feed and the completion's become one token
    (one,), counts = build_features([row], student, teacher)
    assert row.text.encode().endswith(spelled(student.view, one.student_ids[one.label_from :]))
    start = len(row.text.encode()) - len(spelled(student.view, one.student_ids[one.label_from :]))
    assert start > row.completion_start
    assert all(spelled(student.view, one.student_ids[: g[2]]) for g in one.groups)
    assert counts.trained == 1


def test_empty_and_too_long_rows_are_counted(sides: tuple[Side, Side]) -> None:
    student, teacher = sides
    rows = [Row(1, "question", ""), Row(2, "word " * 50, "answer"), Row(3, "q", "fine")]
    for others in (teacher, None):
        features, counts = build_features(rows, student, others, max_length=20)
        assert [one.row for one in features] == [3]
        assert counts == RowCounts(read=3, trained=1, empty=1, too_long=1)


def test_without_a_teacher_there_are_no_groups(sides: tuple[Side, Side], rows: list[Row]) -> None:
    student, teacher = sides
    alone, _ = build_features(rows, student, None)
    together, _ = build_features(rows, student, teacher)
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.student_ids, other.student_ids)
        assert one.label_from == other.label_from
        assert len(one.groups) == len(one.teacher_ids) == 0


@pytest.mark.parametrize("aligner", ["anchored", "bytes", "dtw", "entropy-dtw"])
def test_every_aligner(real_view, rows: list[Row], aligner: str) -> None:
    student, teacher = side(real_view("mistral")), side(real_view("smollm2"))
    features, _ = build_features(rows[:8], student, teacher, aligner=aligner)
    for one in features:
        assert len(one.groups) > 10
        assert (one.groups[:, 0] < one.groups[:, 1]).all()
        assert (one.groups[:, 2] >= one.label_from).all()


def test_counts_read_as_a_line() -> None:
    assert str(RowCounts(5, 3, 1, 0, 1, 1)) == "5 read, 3 trained, 1 cut, 0 unaligned, 1 empty, 1 too long"
