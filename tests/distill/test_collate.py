"""Batches: what is padded, and where logits are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cdm_toolkit.distill.collate import Collator, Padding
from cdm_toolkit.distill.data import Features


def features(row: int, n_s: int, label_from: int, n_t: int, groups: list[list[int]]) -> Features:
    """Make a row whose ids are 100 · row + place, teacher's 1,000 more."""
    ids_s, ids_t = 100 * row + np.arange(n_s), 1000 + 100 * row + np.arange(n_t)
    return Features(
        row,
        ids_s.astype(np.int32),
        label_from,
        ids_t.astype(np.int32),
        np.array(groups, np.int32).reshape(-1, 4),
    )


ROWS = [
    features(1, 7, 3, 5, [[2, 3, 3, 5], [3, 5, 5, 6]]),
    features(2, 4, 2, 8, [[4, 7, 2, 3], [7, 8, 3, 4]]),
    features(3, 9, 5, 3, []),
]
SIDES: list[Padding] = ["left", "right"]


@pytest.mark.parametrize("left_s", SIDES)
@pytest.mark.parametrize("left_t", SIDES)
def test_boundary_positions(left_s: Padding, left_t: Padding) -> None:
    batch = Collator(student_padding=left_s, teacher_padding=left_t, student_pad=-1, teacher_pad=-2)(ROWS)
    assert (batch["rows"], batch["groups"]) == ((1, 2, 3), (2, 2, 0))
    ids_s, ids_t = batch["input_ids"].flatten(), batch["teacher_input_ids"].flatten()
    expected = [103, 104, 105, 106, 202, 203, 305, 306, 307, 308]
    assert batch["labels"].tolist() == expected
    assert ids_s[batch["label_at"]].tolist() == [label - 1 for label in expected]
    # before a group: teacher t0 - 1, student s0 - 1
    assert ids_t[batch["teacher_at"]].tolist() == [1101, 1102, 1203, 1206]
    assert ids_s[batch["label_at"][batch["student_rows"]]].tolist() == [102, 104, 201, 202]
    for side, pad in (("", -1), ("teacher_", -2)):
        ids, mask = batch[f"{side}input_ids"], batch[f"{side}attention_mask"]  # type: ignore[literal-required]
        assert torch.equal(ids != pad, mask.bool())
    assert ("position_ids" in batch) == (left_s == "left")
    assert ("teacher_position_ids" in batch) == (left_t == "left")
    if left_s == "left":
        assert torch.equal(batch["position_ids"][1], torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3]))


def test_mean_positions() -> None:
    batch = Collator(positions="mean")(ROWS)
    ids_s, ids_t = batch["input_ids"].flatten(), batch["teacher_input_ids"].flatten()
    read_t = [
        ids_t[batch["teacher_at"]][batch["teacher_group"] == i].tolist() for i in range(sum(batch["groups"]))
    ]
    read_s = [
        ids_s[batch["label_at"]][batch["student_rows"]][batch["student_group"] == i].tolist()
        for i in range(sum(batch["groups"]))
    ]
    # the logits that predict the group's tokens
    assert read_t == [[1101], [1102, 1103], [1203, 1204, 1205], [1206]]
    assert read_s == [[102, 103], [104], [201], [202]]


def test_a_batch_without_groups_asks_nothing_of_the_teacher() -> None:
    batch = Collator()([ROWS[2]])
    assert batch["groups"] == (0,)
    assert "teacher_input_ids" not in batch
