"""Rows of features to tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from cdm_toolkit.distill.config import Positions
from cdm_toolkit.distill.data import Features, TeacherFeatures
from cdm_toolkit.hub.batches import Padding, padded

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64
    from torch import Tensor


class TeacherBatch(TypedDict, total=False):
    """What a batch asks of one teacher; only `groups`, all 0, where none of its rows has a group.

    TypedDicts because `transformers.Trainer` moves mappings to its device. `position_ids` are there for a side
    that is padded on the left; `student_group` where positions is `mean`; `group`, `first` and `next_ids` where
    all tokens of the groups are read; `token_*` where the method looks at whole tokens.
    """

    groups: tuple[int, ...]
    """How many groups each row has: the groups of a batch are one flat list."""
    counts: tuple[int, ...]
    """How many logits are read of each row."""
    input_ids: Int64[Tensor, "batch time_t"]
    attention_mask: Int64[Tensor, "batch time_t"]
    position_ids: Int64[Tensor, "batch time_t"]
    at: Int64[Tensor, " row_t"]
    """Where in batch × time_t the logits stand that are read."""
    places: Int64[Tensor, " row_t"]
    """The same, in the row's own tokens, without padding."""
    group: Int64[Tensor, " row_t"]
    """Which group each of them belongs to."""
    first: Int64[Tensor, " group"]
    """Which of them is the first of each group."""
    next_ids: Int64[Tensor, " row_t"]
    """The token that each of them predicts."""
    student_rows: Int64[Tensor, " row_s"]
    """Which of the labels' logits each group reads."""
    student_group: Int64[Tensor, " row_s"]
    token_rows: Int64[Tensor, " token_s"]
    """Which of the labels the student's tokens of each group are."""
    token_group: Int64[Tensor, " token_s"]


class Batch(TypedDict, total=False):
    """A batch. Positions are flat: they count through batch × time, or through the labels."""

    rows: tuple[int, ...]
    """The rows' numbers in the file."""
    input_ids: Int64[Tensor, "batch time_s"]
    attention_mask: Int64[Tensor, "batch time_s"]
    position_ids: Int64[Tensor, "batch time_s"]
    labels: Int64[Tensor, " token"]
    label_at: Int64[Tensor, " token"]
    """Where in batch × time_s the logits stand that predict each label."""
    label_row: Int64[Tensor, " token"]
    """Which row of the batch each label belongs to."""
    teachers: tuple[TeacherBatch, ...]


def _ranges(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write out the half-open ranges one after the other; gives their members and whose they are."""
    counts = end - first
    owner = np.repeat(np.arange(len(first)), counts)
    return np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + first[owner], owner


def _side(
    sequences: Sequence[Int32[np.ndarray, " time"]], pad: int, padding: Padding
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Lay out what a model reads; gives also where each sequence begins."""
    ids, mask, starts = padded(sequences, pad, padding)
    arrays = {"input_ids": ids, "attention_mask": mask}
    if padding == "left":
        arrays["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
    return arrays, starts


@dataclass(frozen=True, slots=True)
class TeacherLayout:
    """How a teacher's method reads groups.

    A group [t0, t1) × [s0, s1) reads at `boundary` the logits at t0 - 1 and s0 - 1, the distributions that
    follow the same text; at `mean` the means of the logits that predict its tokens, at t0 - 1 … t1 - 2 and
    s0 - 1 … s1 - 2. `tokens` adds the log-probabilities of these tokens, `student_tokens` only where the student's
    stand.
    """

    positions: Positions = "boundary"
    tokens: bool = False
    student_tokens: bool = False
    pad: int = 0
    padding: Padding = "right"


@dataclass(frozen=True, slots=True)
class Collator:
    """Pad all sides and lay out where logits are needed."""

    teachers: tuple[TeacherLayout, ...] = ()
    student_pad: int = 0
    student_padding: Padding = "right"

    def __call__(self, rows: Sequence[Features]) -> Batch:
        arrays, starts = _side([row.student_ids for row in rows], self.student_pad, self.student_padding)
        label_from = np.array([row.label_from for row in rows])
        counts = np.array([row.labels for row in rows])
        label_at, label_row = _ranges(starts + label_from - 1, starts + label_from - 1 + counts)
        arrays |= {
            "labels": arrays["input_ids"].reshape(-1)[label_at + 1],
            "label_at": label_at,
            "label_row": label_row,
        }
        first_label = np.cumsum(counts) - counts - label_from
        teachers = tuple(
            _teacher(layout, [row.teachers[nth] for row in rows], first_label)
            for nth, layout in enumerate(self.teachers)
        )
        return Batch(rows=tuple(row.row for row in rows), teachers=teachers, **_tensors(arrays))


def _teacher(layout: TeacherLayout, rows: Sequence[TeacherFeatures], first_label: np.ndarray) -> TeacherBatch:
    counts = tuple(len(row.groups) for row in rows)
    if not any(counts):
        return TeacherBatch(groups=counts)
    arrays, starts = _side([row.ids for row in rows], layout.pad, layout.padding)
    groups = np.concatenate([row.groups for row in rows]).astype(np.int64)
    owner = np.repeat(np.arange(len(rows)), counts)  # the row of each group
    first_t, end_t, first_s, end_s = groups.T
    label_s, label_end = first_s + first_label[owner], end_s + first_label[owner]
    student_rows, student_group = _ranges(label_s, label_end)
    if layout.positions == "boundary" and not layout.tokens:
        places, place_row = first_t - 1, owner
        arrays["student_rows"] = label_s
    else:
        places, group = _ranges(first_t - 1, end_t - 1)
        place_row = owner[group]
        arrays |= {"group": group, "first": np.searchsorted(group, np.arange(len(groups)))}
        if layout.positions == "mean":
            arrays |= {"student_rows": student_rows, "student_group": student_group}
        else:
            arrays["student_rows"] = label_s
    at = places + starts[place_row]
    arrays |= {"at": at, "places": places}
    if layout.tokens or layout.student_tokens:
        arrays |= {"token_rows": student_rows, "token_group": student_group}
    if layout.tokens:
        arrays["next_ids"] = arrays["input_ids"].reshape(-1)[at + 1]
    read = tuple(np.bincount(place_row, minlength=len(rows)).tolist())
    return TeacherBatch(groups=counts, counts=read, **_tensors(arrays))


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
