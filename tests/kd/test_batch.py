"""Batches: what is padded, and where logits are read."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from cdm_toolkit.batching import Padding
from cdm_toolkit.kd.aligned_rows import AlignedRow, AlignedTeacherRow
from cdm_toolkit.kd.batch import AlignedTeacherBatch, Collator

PAIR = (("t", "s"),)


def aligned(row: int, n_s: int, label_from: int, n_t: int, groups: list[list[int]]) -> AlignedRow:
    """Make a row whose ids are 100 · row + position, teacher's 1,000 more."""
    ids_s, ids_t = 100 * row + np.arange(n_s), 1000 + 100 * row + np.arange(n_t)
    teacher = AlignedTeacherRow(ids_t.astype(np.int32), np.array(groups, np.int32).reshape(-1, 4))
    turns = np.array([[label_from, n_s]], np.int32)
    return AlignedRow(row, ids_s.astype(np.int32), turns, (teacher,))


ROWS = [
    aligned(1, 7, 3, 5, [[2, 3, 3, 5], [3, 5, 5, 6]]),
    aligned(2, 4, 2, 8, [[4, 7, 2, 3], [7, 8, 3, 4]]),
    aligned(3, 9, 5, 3, []),
]
SIDES: list[Padding] = ["left", "right"]


def ids_at(teacher: AlignedTeacherBatch, positions: torch.Tensor) -> list[int]:
    """Give the teacher's ids at flat positions."""
    return teacher.inputs["input_ids"].flatten()[positions].tolist()


@pytest.mark.parametrize("left_s", SIDES)
@pytest.mark.parametrize("left_t", SIDES)
def test_boundary_positions(left_s: Padding, left_t: Padding) -> None:
    collator = Collator(PAIR, student_padding=left_s, student_pad=-1, teacher_padding=left_t, teacher_pad=-2)
    batch = collator(ROWS)
    (teacher,) = batch.teachers
    assert (batch.rows, teacher.groups_per_row, teacher.groups) == ((1, 2, 3), (2, 2, 0), 4)
    assert batch.teacher is teacher.inputs
    ids_s = batch.student["input_ids"].flatten()
    expected = [103, 104, 105, 106, 202, 203, 305, 306, 307, 308]
    assert batch.labels.tolist() == expected
    assert batch.label_row.tolist() == [0] * 4 + [1] * 2 + [2] * 4
    assert ids_s[batch.label_positions].tolist() == [label - 1 for label in expected]
    # before a group: teacher t0 - 1, student s0 - 1
    assert ids_at(teacher, teacher.group_positions) == [1101, 1102, 1203, 1206]
    assert teacher.row_positions[teacher.group_first].tolist() == [1, 2, 3, 6], (
        "the same in the row's own tokens, without padding"
    )
    assert ids_s[batch.label_positions[teacher.student_rows]].tolist() == [102, 104, 201, 202]
    for side, pad in ((batch.student, -1), (teacher.inputs, -2)):
        assert torch.equal(side["input_ids"] != pad, side["attention_mask"].bool())
    assert ("position_ids" in batch.student) == (left_s == "left")
    assert ("position_ids" in teacher.inputs) == (left_t == "left")
    if left_s == "left":
        assert torch.equal(batch.student["position_ids"][1], torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3]))


def test_positions_whose_mean_is_read() -> None:
    batch = Collator(PAIR)(ROWS)
    (teacher,) = batch.teachers
    ids_s = batch.student["input_ids"].flatten()[batch.label_positions]
    ids_t = torch.tensor(ids_at(teacher, teacher.token_positions))
    read_t = [ids_t[teacher.token_group == i].tolist() for i in range(teacher.groups)]
    read_s = [
        ids_s[teacher.student_token_rows][teacher.student_token_group == i].tolist()
        for i in range(teacher.groups)
    ]
    # the logits that predict the group's tokens
    assert read_t == [[1101], [1102, 1103], [1203, 1204, 1205], [1206]]
    assert read_s == [[102, 103], [104], [201], [202]]
    assert teacher.tokens_per_row == (3, 4, 0)


@pytest.mark.parametrize("padding", SIDES)
def test_whole_tokens(padding: Padding) -> None:
    batch = Collator(PAIR, teacher_padding=padding)(ROWS)
    (teacher,) = batch.teachers
    assert teacher.next_ids.tolist() == [place + 1 for place in ids_at(teacher, teacher.token_positions)]
    assert teacher.next_ids.tolist() == [1102, 1103, 1104, 1204, 1205, 1206, 1207]
    assert teacher.token_group.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert teacher.row_positions.tolist() == [1, 2, 3, 3, 4, 5, 6]
    labels = batch.labels[teacher.student_token_rows]
    assert labels.tolist() == [103, 104, 105, 202, 203], "the student's tokens of the groups"
    assert teacher.student_token_group.tolist() == [0, 0, 1, 2, 3]
    assert batch.labels[teacher.student_rows].tolist() == [103, 105, 202, 203], "the first of each"


def test_a_batch_without_groups_asks_nothing_of_the_teacher() -> None:
    (teacher,) = Collator(PAIR)([ROWS[2]]).teachers
    assert teacher.empty
    assert (teacher.groups, teacher.groups_per_row, teacher.tokens_per_row) == (0, (0,), (0,))
    assert len(teacher.group_positions) == len(teacher.token_positions) == len(teacher.student_rows) == 0


def as_lists(teacher: AlignedTeacherBatch) -> dict[str, Any]:
    values = {field.name: getattr(teacher, field.name) for field in fields(teacher)}
    values |= {name: tensor.tolist() for name, tensor in values.pop("inputs").items()}
    return {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def test_each_teacher_is_laid_out_as_it_is_alone() -> None:
    two = [AlignedRow(r.row, r.student_ids, r.turns, r.teachers * 2) for r in ROWS]
    pairs, names = (("a", "s"), ("b", "s")), (("first", "student"), ("second", "student"))
    joined = Collator(pairs, names)(two)
    for nth, teacher in enumerate(joined.teachers):
        (alone,) = Collator(pairs[nth : nth + 1], names[nth : nth + 1])(ROWS).teachers
        assert as_lists(alone) == as_lists(teacher)
        assert joined.of_teacher(nth).teachers == (teacher,)


def test_all_tensors_move_together() -> None:
    """Also those in mappings and in the teachers."""
    moved = Collator(PAIR)(ROWS).to("meta")
    (teacher,) = moved.teachers
    tensors = [getattr(value, field.name) for value in (moved, teacher) for field in fields(value)]
    tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
    tensors += [*moved.student.values(), *teacher.inputs.values()]
    assert len(tensors) == 15
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.rows, teacher.groups_per_row) == ((1, 2, 3), (2, 2, 0))
