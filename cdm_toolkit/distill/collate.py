"""Rows of features to tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from cdm_toolkit.distill.config import Positions
from cdm_toolkit.distill.data import Features

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64
    from torch import Tensor

Padding = Literal["right", "left"]


class Batch(TypedDict, total=False):
    """A batch. Positions are flat: they count through batch × time, or through the labels.

    A TypedDict because `transformers.Trainer` moves mappings to its device. `position_ids` are there for a
    side that is padded on the left, `*_group` where `positions` is `mean`, and all from `teacher_input_ids`
    on where any row has a group.
    """

    rows: tuple[int, ...]
    """The rows' numbers in the file."""
    groups: tuple[int, ...]
    """How many groups each row has: the groups of a batch are one flat list."""
    input_ids: Int64[Tensor, "batch time_s"]
    attention_mask: Int64[Tensor, "batch time_s"]
    position_ids: Int64[Tensor, "batch time_s"]
    labels: Int64[Tensor, " token"]
    label_at: Int64[Tensor, " token"]
    """Where in batch × time_s the logits stand that predict each label."""
    teacher_input_ids: Int64[Tensor, "batch time_t"]
    teacher_attention_mask: Int64[Tensor, "batch time_t"]
    teacher_position_ids: Int64[Tensor, "batch time_t"]
    student_rows: Int64[Tensor, " row_s"]
    """Which of the labels' logits each group reads."""
    student_group: Int64[Tensor, " row_s"]
    teacher_at: Int64[Tensor, " row_t"]
    """Where in batch × time_t the logits stand that each group reads."""
    teacher_group: Int64[Tensor, " row_t"]


def _padded(
    sequences: Sequence[Int32[np.ndarray, " time"]], pad: int, padding: Padding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad to one length; gives ids, mask, and where each sequence begins in batch × time."""
    lengths = np.array([len(ids) for ids in sequences])
    time = int(lengths.max())
    places = np.arange(time)
    offsets = time - lengths if padding == "left" else np.zeros_like(lengths)
    mask = (places >= offsets[:, None]) & (places < (offsets + lengths)[:, None])
    ids = np.full(mask.shape, pad, np.int64)
    ids[mask] = np.concatenate(sequences)
    return ids, mask.astype(np.int64), np.arange(len(sequences)) * time + offsets


def _ranges(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write out the half-open ranges one after the other; gives their members and whose they are."""
    counts = end - first
    owner = np.repeat(np.arange(len(first)), counts)
    return np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + first[owner], owner


@dataclass(frozen=True, slots=True)
class Collator:
    """Pad both sides and lay out where logits are needed.

    `boundary`: a group [t0, t1) × [s0, s1) reads the logits at t0 - 1 and s0 - 1, the distributions that
    follow the same text. `mean`: the means of the logits that predict its tokens, at t0 - 1 … t1 - 2 and
    s0 - 1 … s1 - 2.
    """

    positions: Positions = "boundary"
    student_pad: int = 0
    teacher_pad: int = 0
    student_padding: Padding = "right"
    teacher_padding: Padding = "right"

    def __call__(self, rows: Sequence[Features]) -> Batch:
        import torch

        ids, mask, starts = _padded([r.student_ids for r in rows], self.student_pad, self.student_padding)
        label_from = np.array([r.label_from for r in rows])
        counts = np.array([r.labels for r in rows])
        label_at, _ = _ranges(starts + label_from - 1, starts + label_from - 1 + counts)
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.reshape(-1)[label_at + 1],
            "label_at": label_at,
        }
        if self.student_padding == "left":
            arrays["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
        groups = tuple(len(r.groups) for r in rows)
        if any(groups):
            arrays |= self._teacher(rows, first_label=np.cumsum(counts) - counts - label_from)
        tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
        return Batch(rows=tuple(r.row for r in rows), groups=groups, **tensors)

    def _teacher(self, rows: Sequence[Features], first_label: np.ndarray) -> dict[str, np.ndarray]:
        ids, mask, starts = _padded([r.teacher_ids for r in rows], self.teacher_pad, self.teacher_padding)
        groups = np.concatenate([r.groups for r in rows]).astype(np.int64)
        owner = np.repeat(np.arange(len(rows)), [len(r.groups) for r in rows])
        first_t, end_t, first_s, end_s = groups.T
        first_t, end_t = first_t + starts[owner] - 1, end_t + starts[owner] - 1
        first_s, end_s = first_s + first_label[owner], end_s + first_label[owner]
        side = {"teacher_input_ids": ids, "teacher_attention_mask": mask}
        if self.teacher_padding == "left":
            side["teacher_position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
        if self.positions == "boundary":
            return side | {"student_rows": first_s, "teacher_at": first_t}
        student_rows, student_group = _ranges(first_s, end_s)
        teacher_at, teacher_group = _ranges(first_t, end_t)
        return side | {
            "student_rows": student_rows,
            "student_group": student_group,
            "teacher_at": teacher_at,
            "teacher_group": teacher_group,
        }
