"""Cross-entropy and the methods of all teachers, with one pass over the student's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cdm_toolkit.kd.batch import AlignedBatch, AlignedTeacherBatch
from cdm_toolkit.kd.sparse_logprobs import log_sum_exp, mean_logits, sparse_logprobs
from cdm_toolkit.kd.types import Comparison, KDSums, LogprobRequest, LossSums, StudentLogits, TeacherSignal


@runtime_checkable
class TwoPhases(Protocol):
    """What a loss needs of a method."""

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[Any]: ...

    def loss(self, logprobs: Tensor, request: LogprobRequest[Any], signal: TeacherSignal) -> KDSums: ...

    def compare(
        self, logprobs: Tensor, request: LogprobRequest[Any], signal: TeacherSignal
    ) -> Comparison: ...


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """A teacher's method on a batch: its signal, and the student logits to read for it.

    A group is predicted by the row `student_rows` of the labels' logits or, where `student_group` is there, by
    the mean of the rows that `student_group` assigns to it. `token_*` and `follows` are those of `StudentLogits`:
    rows of the labels' logits, so that no method that reads tokens reads means. `vocab_s` counts the ids of the
    student's tokenizer.
    """

    method: TwoPhases
    signal: TeacherSignal
    vocab_s: int
    student_rows: Int64[Tensor, " row"]
    student_group: Int64[Tensor, " row"] | None = None
    token_rows: Int64[Tensor, " token_s"] | None = None
    token_ids: Int64[Tensor, " token_s"] | None = None
    token_group: Int64[Tensor, " token_s"] | None = None
    follows: Bool[Tensor, " group"] | None = None

    def __post_init__(self) -> None:
        if self.student_group is not None and self.token_rows is not None:
            raise ValueError("a method that reads tokens reads rows of the labels' logits, not means")

    @classmethod
    def of(
        cls, method: Any, signal: TeacherSignal, batch: AlignedBatch, side: AlignedTeacherBatch
    ) -> LossInputs:
        """Lay out what a `Method` reads of one teacher's side of a batch."""
        mean, tokens = method.mean_logits, method.reads_teacher_tokens or method.reads_student_tokens
        return cls(
            method=method,
            signal=signal,
            vocab_s=method.pair.vocab_s,
            student_rows=side.student_token_rows if mean else side.student_rows,
            student_group=side.student_token_group if mean else None,
            token_rows=side.student_token_rows if tokens else None,
            token_ids=batch.labels.index_select(0, side.student_token_rows) if tokens else None,
            token_group=side.student_token_group if tokens else None,
            follows=following_groups(batch, side) if tokens else None,
        )


def following_groups(batch: AlignedBatch, side: AlignedTeacherBatch) -> Bool[Tensor, " group"]:
    """Mark the groups that begin where the one before ends, on both sides of one row."""
    groups = torch.arange(side.groups, device=side.student_token_group.device)
    last_s = torch.searchsorted(side.student_token_group, groups).sub(1).clamp(min=0)
    last_t = side.group_first.sub(1).clamp(min=0)
    row_before = side.student_token_rows.index_select(0, last_s)
    before, here = (batch.label_row.index_select(0, rows) for rows in (row_before, side.student_rows))
    end_s, first_s = (batch.label_positions.index_select(0, rows) for rows in (row_before, side.student_rows))
    end_t, first_t = (side.row_positions.index_select(0, each) for each in (last_t, side.group_first))
    return (before == here) & (end_s + 1 == first_s) & (end_t + 1 == first_t)


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """Logits that log-probabilities are requested of."""

    logits: Float[Tensor, "row vocab"]
    lse: Float[Tensor, " row"]


def loss_sums(
    logits: Float[Tensor, "token vocab"],
    labels: Int64[Tensor, " token"],
    inputs: Sequence[LossInputs | None] = (),
) -> LossSums:
    """Sum CE = −Σ log p_student(label) over the labels, and each teacher's divergence over its groups.

    `logits` are those that predict `labels`. A teacher whose signal is NaN has a KD of NaN. Inputs that are None
    are a teacher without a group in this batch: all 0. Without inputs this is supervised fine-tuning. All that is
    read of `logits` is read at once, so that one gradient tensor of its shape is written; means of logits are
    further sources, each with its own.
    """
    of_labels = _Source(logits, log_sum_exp(logits.detach()))
    selected = [None if one is None else _select(one, of_labels) for one in inputs]
    shared = [request for source, request in filter(None, selected) if source is of_labels]
    every = torch.arange(len(labels), device=labels.device)
    picked = sparse_logprobs(
        logits,
        of_labels.lse,
        torch.cat((every, *(request.rows for request in shared))),
        torch.cat((labels, *(request.ids for request in shared))),
    )
    label_logprobs, *parts = picked.split([len(labels), *(len(request.rows) for request in shared)])
    of_shared = iter(parts)
    nothing = label_logprobs.detach().new_zeros(())
    kd = []
    for one, found in zip(inputs, selected, strict=True):
        if one is None or found is None:
            kd.append(KDSums(nothing, nothing, nothing))
            continue
        source, request = found
        if source is of_labels:
            logprobs = next(of_shared)
        else:
            logprobs = sparse_logprobs(source.logits, source.lse, request.rows, request.ids)
        kd.append(_or_nan(one.method.loss(logprobs, request, one.signal.detach()), one.signal))
    return LossSums(ce=-label_logprobs.sum(), kd=tuple(kd), label_logprobs=label_logprobs.detach())


def compare(logits: Float[Tensor, "token vocab"], inputs: LossInputs) -> Comparison:
    """Give what a method compares at each position; `logits` are those that predict the labels.

    BadOption for a method that compares no distributions over student tokens.
    """
    source, request = _select(inputs, _Source(logits, log_sum_exp(logits.detach())))
    logprobs = sparse_logprobs(source.logits, source.lse, request.rows, request.ids)
    return inputs.method.compare(logprobs, request, inputs.signal.detach())


def _or_nan(sums: KDSums, signal: TeacherSignal) -> KDSums:
    """Make KD NaN where the signal is: methods leave out what is no number, and nobody would notice."""
    bad = signal.top.logprobs.isnan().any()
    return replace(sums, kd=sums.kd.masked_fill(bad, torch.nan))


def _select(inputs: LossInputs, of_labels: _Source) -> tuple[_Source, LogprobRequest[Any]]:
    """Let a method select, and say of which logits."""
    source, rows = of_labels, inputs.student_rows
    if inputs.student_group is not None:
        groups = len(inputs.signal.top.ids)
        means = mean_logits(of_labels.logits, rows, inputs.student_group, groups)
        source = _Source(means, log_sum_exp(means.detach()))
        rows = torch.arange(groups, device=rows.device)
    student = StudentLogits(
        logits=source.logits.detach(),
        lse=source.lse,
        rows=rows,
        vocab=inputs.vocab_s,
        token_rows=inputs.token_rows,
        token_ids=inputs.token_ids,
        token_group=inputs.token_group,
        follows=inputs.follows,
    )
    return source, inputs.method.select(student, inputs.signal.detach())
