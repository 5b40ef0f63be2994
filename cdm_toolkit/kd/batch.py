"""Batches of aligned rows: padded inputs of all models, and where their logits are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cdm_toolkit.batching import Padding, packed, padded
from cdm_toolkit.errors import BadOption
from cdm_toolkit.forward import logits_at
from cdm_toolkit.kd.aligned_rows import AlignedRow, AlignedTeacherRow
from cdm_toolkit.kd.tokenized_rows import Turns

Packing = Literal["rows", "one"]
PairId = tuple[str, str]
"""Fingerprints of a pair's tokenizers, teacher first."""
Moved = TypeVar("Moved", "AlignedBatch", "AlignedTeacherBatch")


@dataclass(frozen=True, slots=True, eq=False)
class AlignedTeacherBatch:
    """One teacher's side of a batch; its groups are one flat list over the rows, its tokens those of the groups.

    A group [t0, t1) × [s0, s1) is predicted at the teacher's position t0 − 1 and the student's s0 − 1, which follow
    the same text. `inputs` are the teacher's own ids and mask; flat positions count through its batch × time.
    """

    inputs: Mapping[str, Tensor]
    lengths: tuple[int, ...]
    """Tokens of each row, without padding."""
    groups_per_row: tuple[int, ...]
    tokens_per_row: tuple[int, ...]
    token_positions: Int64[Tensor, " token_t"]
    """Flat positions whose logits predict each teacher token of the groups."""
    row_positions: Int64[Tensor, " token_t"]
    """The same positions counted in the row's own tokens, without padding."""
    token_group: Int64[Tensor, " token_t"]
    next_ids: Int64[Tensor, " token_t"]
    """The teacher tokens themselves."""
    group_first: Int64[Tensor, " group"]
    """Index of each group's first token among `token_positions`."""
    student_rows: Int64[Tensor, " group"]
    """Index of each group's first student token among the batch's labels."""
    student_token_rows: Int64[Tensor, " token_s"]
    """Index of each student token of the groups among the batch's labels."""
    student_token_group: Int64[Tensor, " token_s"]
    pair: PairId = ("", "")
    names: tuple[str, str] = ("teacher", "student")

    @property
    def tokens(self) -> int:
        """Count those of the rows, without padding."""
        return sum(self.lengths)

    @property
    def groups(self) -> int:
        return sum(self.groups_per_row)

    @property
    def empty(self) -> bool:
        """Whether no row of the batch has a group: the teacher then has nothing to say."""
        return self.groups == 0

    @property
    def group_positions(self) -> Int64[Tensor, " group"]:
        """Flat positions whose logits predict the first teacher token of each group."""
        return self.token_positions.index_select(0, self.group_first)

    def to(self, device: Any, non_blocking: bool = False) -> AlignedTeacherBatch:
        """Move the tensors to a device."""
        return _moved(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def to_teacher(self, device: Any) -> AlignedTeacherBatch:
        """Move what a teacher reads to its device; where the student's tokens are, stays."""
        names = ("inputs", "token_positions", "token_group", "next_ids", "group_first")
        parts = {name: _part_moved(getattr(self, name), lambda tensor: tensor.to(device)) for name in names}
        return replace(self, **parts)


@dataclass(frozen=True, slots=True, eq=False)
class AlignedBatch:
    """Rows of one student and its teachers, padded and aligned.

    `student` holds the keyword arguments of the student's model; `tokens` counts what it reads, without padding.
    `labels` are all tokens to learn, one flat list over the rows; `label_positions` are the flat positions (through
    batch × time) whose logits predict them, and `label_row` the row of each in the batch. `rows` are the rows' numbers
    in the data, from 1.
    """

    rows: tuple[int, ...]
    student: Mapping[str, Tensor]
    tokens: int
    labels: Int64[Tensor, " label"]
    label_positions: Int64[Tensor, " label"]
    label_row: Int64[Tensor, " label"]
    teachers: tuple[AlignedTeacherBatch, ...] = ()

    @property
    def teacher(self) -> Mapping[str, Tensor]:
        """Keyword arguments of the teacher's model, where there is one teacher."""
        (side,) = self.teachers
        return side.inputs

    def of_teacher(self, nth: int) -> AlignedBatch:
        """Keep one of several teachers."""
        return replace(self, teachers=(self.teachers[nth],))

    def to(self, device: Any, non_blocking: bool = False) -> AlignedBatch:
        """Move the tensors to a device."""
        return _moved(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AlignedBatch:
        """Pin the tensors, as a DataLoader does for batches that go to a GPU."""
        return _moved(self, lambda tensor: tensor.pin_memory())

    def student_logits_at(self, student: nn.Module) -> Float[Tensor, "label vocab"]:
        """Run the student, and its output embedding at the labels alone: logits of prompts are never made."""
        own: Any = getattr(student, "module", student)  # under DistributedDataParallel
        head = own.get_output_embeddings()
        return logits_at(student, head, self.label_positions, **self.student)

    def at_labels(
        self,
        logits: Float[Tensor, "batch time_s vocab"] | Float[Tensor, "label vocab"],
        *,
        vocab: int | None = None,
    ) -> Float[Tensor, "label vocab"]:
        """Take whole student logits at the labels; logits that are there already stay as they are.

        BadOption for logits of another shape, or narrower than the `vocab` ids of the student's tokenizer.
        """
        if vocab is not None and logits.shape[-1] < vocab:
            raise BadOption(
                "the width of the student's logits",
                logits.shape[-1],
                f"at least {vocab}, a column for each id of its tokenizer: is this the pair's student?",
            )
        if logits.ndim == 3 and logits.shape[:2] == self.student["input_ids"].shape:
            return logits.flatten(0, 1).index_select(0, self.label_positions)
        if logits.ndim == 2 and len(logits) == len(self.labels):
            return logits
        batch, time = self.student["input_ids"].shape
        raise BadOption(
            "the shape of the student's logits",
            tuple(logits.shape),
            f"whole logits ({batch}, {time}, vocab), or those at the labels ({len(self.labels)}, vocab)",
        )


def _moved(value: Moved, move: Any) -> Moved:
    """Apply a function to all tensors of a record, also to those in its parts."""
    moved = {field.name: _part_moved(getattr(value, field.name), move) for field in fields(value)}
    return replace(value, **moved)


def _part_moved(part: Any, move: Any) -> Any:
    if isinstance(part, Tensor):
        return move(part)
    if isinstance(part, Mapping):
        return {name: _part_moved(each, move) for name, each in part.items()}
    if isinstance(part, AlignedTeacherBatch):
        return _moved(part, move)
    if isinstance(part, tuple):
        return tuple(_part_moved(each, move) for each in part)
    return part


@dataclass(frozen=True, slots=True)
class Collator:
    """Pad or pack all sides of aligned rows, and lay out where logits are read.

    `pairs` and `names` are those of the pairs that the rows were aligned by, for methods to check. With `packing` the
    rows of a batch lie end to end in a few `rows`, or in `one` row, which attention of variable
    length asks for; what models read then has positions that restart at each row, in place of a mask.
    """

    pairs: tuple[PairId, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    student_pad: int = 0
    teacher_pad: int = 0
    student_padding: Padding = "right"
    teacher_padding: Padding = "right"
    packing: Packing | None = None

    def __call__(self, rows: Sequence[AlignedRow]) -> AlignedBatch:
        """Make a batch; every row has as many teachers as there are pairs."""
        ids = [row.student_ids for row in rows]
        student, starts = _inputs(ids, self.student_pad, self.student_padding, self.packing)
        layout = _Labels.of([row.turns for row in rows])
        positions, turn = _ranges(
            layout.first - 1 + starts[layout.row], layout.first - 1 + layout.counts + starts[layout.row]
        )
        return AlignedBatch(
            rows=tuple(row.row for row in rows),
            student=student,
            tokens=sum(map(len, ids)),
            labels=student["input_ids"].reshape(-1)[torch.from_numpy(positions + 1)],
            label_positions=_tensor(positions),
            label_row=_tensor(layout.row[turn]),
            teachers=tuple(
                self._teacher(nth, [row.teachers[nth] for row in rows], layout)
                for nth in range(len(self.pairs))
            ),
        )

    def _teacher(self, nth: int, rows: Sequence[AlignedTeacherRow], labels: _Labels) -> AlignedTeacherBatch:
        counts = tuple(len(row.groups) for row in rows)
        ids = [row.ids for row in rows]
        inputs, starts = _inputs(ids, self.teacher_pad, self.teacher_padding, self.packing)
        groups = np.concatenate([row.groups for row in rows]).astype(np.int64)
        owner = np.repeat(np.arange(len(rows)), counts)  # the row of each group
        first_t, end_t, first_s, end_s = groups.T
        row_positions, token_group = _ranges(first_t - 1, end_t - 1)
        token_row = owner[token_group]
        positions = row_positions + starts[token_row]
        student_rows = labels.index_of(owner, first_s)
        student_token_rows, student_token_group = _ranges(student_rows, student_rows + end_s - first_s)
        return AlignedTeacherBatch(
            inputs=inputs,
            lengths=tuple(map(len, ids)),
            groups_per_row=counts,
            tokens_per_row=tuple(np.bincount(token_row, minlength=len(rows)).tolist()),
            token_positions=_tensor(positions),
            row_positions=_tensor(row_positions),
            token_group=_tensor(token_group),
            next_ids=inputs["input_ids"].reshape(-1)[torch.from_numpy(positions + 1)],
            group_first=_tensor(np.searchsorted(token_group, np.arange(len(groups)))),
            student_rows=_tensor(student_rows),
            student_token_rows=_tensor(student_token_rows),
            student_token_group=_tensor(student_token_group),
            pair=self.pairs[nth],
            names=self.names[nth] if self.names else ("teacher", "student"),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """The labels of a batch: of each turn its row, the index of its first token in that row, and their number."""

    row: Int64[np.ndarray, " turn"]
    first: Int64[np.ndarray, " turn"]
    counts: Int64[np.ndarray, " turn"]

    @classmethod
    def of(cls, rows: Sequence[Turns]) -> _Labels:
        turns = np.concatenate(rows).astype(np.int64)
        row = np.repeat(np.arange(len(rows)), [len(of_row) for of_row in rows])
        return cls(row, turns[:, 0], turns[:, 1] - turns[:, 0])

    def index_of(
        self, row: Int64[np.ndarray, " token"], token: Int64[np.ndarray, " token"]
    ) -> Int64[np.ndarray, " token"]:
        """Give the index among the batch's labels of tokens that are labels, by row and index in the row."""
        apart = 1 + max(self.first.max(initial=0), token.max(initial=0))
        turn = np.searchsorted(self.row * apart + self.first, row * apart + token, "right") - 1
        before = np.cumsum(self.counts) - self.counts
        index: Int64[np.ndarray, " token"] = before[turn] + token - self.first[turn]
        return index


def _ranges(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write out the half-open ranges one after the other; gives their members and whose they are."""
    counts = end - first
    owner = np.repeat(np.arange(len(first)), counts)
    return np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + first[owner], owner


def _inputs(
    sequences: Sequence[np.ndarray], pad: int, padding: Padding, packing: Packing | None
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Lay out what a model reads, and tell where each sequence begins. Left padding and packing have position_ids."""
    if packing is not None:
        ids, positions, starts = packed(sequences, pad, rows=1 if packing == "one" else None)
        return {"input_ids": _tensor(ids), "position_ids": _tensor(positions)}, starts
    ids, mask, starts = padded(sequences, pad, padding)
    arrays = {"input_ids": ids, "attention_mask": mask}
    if padding == "left":
        arrays["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
    return {name: _tensor(array) for name, array in arrays.items()}, starts


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
