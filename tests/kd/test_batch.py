"""Batches: what is padded, and where logits are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cdm_toolkit.distill.collate import Collator, TeacherBatch, TeacherLayout
from cdm_toolkit.distill.data import Features, TeacherFeatures

from cdm_toolkit.batching import Padding


def features(row: int, n_s: int, label_from: int, n_t: int, groups: list[list[int]]) -> Features:
    """Make a row whose ids are 100 · row + place, teacher's 1,000 more."""
    ids_s, ids_t = 100 * row + np.arange(n_s), 1000 + 100 * row + np.arange(n_t)
    teacher = TeacherFeatures(ids_t.astype(np.int32), np.array(groups, np.int32).reshape(-1, 4))
    return Features(row, ids_s.astype(np.int32), label_from, (teacher,))


ROWS = [
    features(1, 7, 3, 5, [[2, 3, 3, 5], [3, 5, 5, 6]]),
    features(2, 4, 2, 8, [[4, 7, 2, 3], [7, 8, 3, 4]]),
    features(3, 9, 5, 3, []),
]
SIDES: list[Padding] = ["left", "right"]


def read(teacher: TeacherBatch, name: str) -> list[int]:
    """Give the teacher's ids at the places that `name` holds."""
    tensors: Any = teacher
    return teacher["input_ids"].flatten()[tensors[name]].tolist()


@pytest.mark.parametrize("left_s", SIDES)
@pytest.mark.parametrize("left_t", SIDES)
def test_boundary_positions(left_s: Padding, left_t: Padding) -> None:
    layout = TeacherLayout(pad=-2, padding=left_t)
    batch = Collator((layout,), student_padding=left_s, student_pad=-1)(ROWS)
    (teacher,) = batch["teachers"]
    assert (batch["rows"], teacher["groups"], teacher["counts"]) == ((1, 2, 3), (2, 2, 0), (2, 2, 0))
    ids_s = batch["input_ids"].flatten()
    expected = [103, 104, 105, 106, 202, 203, 305, 306, 307, 308]
    assert batch["labels"].tolist() == expected
    assert batch["label_row"].tolist() == [0] * 4 + [1] * 2 + [2] * 4
    assert ids_s[batch["label_at"]].tolist() == [label - 1 for label in expected]
    # before a group: teacher t0 - 1, student s0 - 1
    assert read(teacher, "at") == [1101, 1102, 1203, 1206]
    assert teacher["places"].tolist() == [1, 2, 3, 6], "the same in the row's own tokens, without padding"
    assert ids_s[batch["label_at"][teacher["student_rows"]]].tolist() == [102, 104, 201, 202]
    for side, pad in ((batch, -1), (teacher, -2)):
        assert torch.equal(side["input_ids"] != pad, side["attention_mask"].bool())
    assert ("position_ids" in batch) == (left_s == "left")
    assert ("position_ids" in teacher) == (left_t == "left")
    if left_s == "left":
        assert torch.equal(batch["position_ids"][1], torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3]))


def test_mean_positions() -> None:
    batch = Collator((TeacherLayout("mean"),))(ROWS)
    (teacher,) = batch["teachers"]
    ids_s = batch["input_ids"].flatten()[batch["label_at"]]
    at = torch.tensor(read(teacher, "at"))
    read_t = [at[teacher["group"] == i].tolist() for i in range(sum(teacher["groups"]))]
    read_s = [
        ids_s[teacher["student_rows"]][teacher["student_group"] == i].tolist()
        for i in range(sum(teacher["groups"]))
    ]
    # the logits that predict the group's tokens
    assert read_t == [[1101], [1102, 1103], [1203, 1204, 1205], [1206]]
    assert read_s == [[102, 103], [104], [201], [202]]
    assert teacher["counts"] == (3, 4, 0)
    assert "next_ids" not in teacher


@pytest.mark.parametrize("padding", SIDES)
def test_whole_tokens(padding: Padding) -> None:
    batch = Collator((TeacherLayout(tokens=True, padding=padding),))(ROWS)
    (teacher,) = batch["teachers"]
    assert teacher["next_ids"].tolist() == [place + 1 for place in read(teacher, "at")]
    assert teacher["next_ids"].tolist() == [1102, 1103, 1104, 1204, 1205, 1206, 1207]
    assert teacher["group"].tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert teacher["places"][teacher["first"]].tolist() == [1, 2, 3, 6], "the boundary before each group"
    labels = batch["labels"][teacher["token_rows"]]
    assert labels.tolist() == [103, 104, 105, 202, 203], "the student's tokens of the groups"
    assert teacher["token_group"].tolist() == [0, 0, 1, 2, 3]
    assert batch["labels"][teacher["student_rows"]].tolist() == [103, 105, 202, 203], "the first of each"


def test_a_batch_without_groups_asks_nothing_of_the_teacher() -> None:
    (teacher,) = Collator((TeacherLayout(),))([ROWS[2]])["teachers"]
    assert teacher == {"groups": (0,)}


def test_each_teacher_has_its_own_layout() -> None:
    two = [Features(r.row, r.student_ids, r.label_from, r.teachers * 2) for r in ROWS]
    layouts = (TeacherLayout("mean"), TeacherLayout(tokens=True, padding="left"))
    joined = Collator(layouts)(two)["teachers"]
    for layout, teacher in zip(layouts, joined, strict=True):
        (alone,) = Collator((layout,))(ROWS)["teachers"]
        assert {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in alone.items()} == {
            k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in teacher.items()
        }
