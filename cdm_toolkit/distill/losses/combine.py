"""Cross-entropy and the methods of all teachers, with one pass over the student's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from cdm_toolkit.distill.losses.pick import log_probs, log_sum_exp, mean_logits
from cdm_toolkit.distill.losses.record import (
    KdParts,
    LossParts,
    Method,
    Reading,
    StudentSees,
    TeacherSays,
    TopK,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A teacher's method on a batch: what the teacher says, and where the student is read for it.

    A group reads the row `student_rows` of the labels' logits or, where `student_group` is there, the mean of
    the rows that it names as the group's. `token_*` are those of `StudentSees`: rows of the labels' logits, so
    that no method that looks at whole tokens reads means. `vocab_s` counts the ids of the student's tokenizer.
    """

    method: Method
    says: TeacherSays
    vocab_s: int
    student_rows: Int64[Tensor, " row"]
    student_group: Int64[Tensor, " row"] | None = None
    token_rows: Int64[Tensor, " token_s"] | None = None
    token_ids: Int64[Tensor, " token_s"] | None = None
    token_group: Int64[Tensor, " token_s"] | None = None

    def __post_init__(self) -> None:
        if self.student_group is not None and self.token_rows is not None:
            raise ValueError(
                "a method that looks at whole tokens reads rows of the labels' logits, not means"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """Logits that a reading takes its log-probabilities from."""

    logits: Float[Tensor, "row vocab"]
    lse: Float[Tensor, " row"]


def loss_parts(
    logits: Float[Tensor, "token vocab"],
    labels: Int64[Tensor, " token"],
    readers: Sequence[Reader | None] = (),
) -> LossParts:
    """Sum CE = -Σ log p_student(label) over the labels, and each reader's divergence over its groups.

    `logits` are those that predict `labels`. A teacher that says NaN makes its KD NaN. A reader that is None has
    no group in this batch: all 0. Without readers this is supervised fine-tuning. All that is read of `logits`
    is read at once, so that one gradient tensor of its shape is written; means of logits are further sources,
    each with its own.
    """
    of_labels = _Source(logits, log_sum_exp(logits.detach()))
    readings = [None if reader is None else _read(reader, of_labels) for reader in readers]
    shared = [reading for source, reading in filter(None, readings) if source is of_labels]
    every = torch.arange(len(labels), device=labels.device)
    picked = log_probs(
        logits,
        of_labels.lse,
        torch.cat((every, *(reading.rows for reading in shared))),
        torch.cat((labels, *(reading.ids for reading in shared))),
    )
    label_logprobs, *parts = picked.split([len(labels), *(len(reading.rows) for reading in shared)])
    of_shared = iter(parts)
    nothing = label_logprobs.detach().new_zeros(())
    kd = []
    for reader, found in zip(readers, readings, strict=True):
        if reader is None or found is None:
            kd.append(KdParts(nothing, nothing, nothing))
            continue
        source, reading = found
        own = source is not of_labels
        read = log_probs(source.logits, source.lse, reading.rows, reading.ids) if own else next(of_shared)
        kd.append(_or_nan(reading.divergence(read), reader.says))
    return LossParts(ce=-label_logprobs.sum(), kd=tuple(kd), label_logprobs=label_logprobs.detach())


def _or_nan(parts: KdParts, says: TeacherSays) -> KdParts:
    """Make KD NaN where the teacher is: methods leave out what is no number, and nobody would notice."""
    bad = says.top.logprobs.isnan().any()
    return replace(parts, kd=parts.kd.masked_fill(bad, torch.nan))


def _read(reader: Reader, of_labels: _Source) -> tuple[_Source, Reading]:
    """Let a method choose what it reads, and say of which logits."""
    source, rows = of_labels, reader.student_rows
    if reader.student_group is not None:
        groups = len(reader.says.top.ids)
        means = mean_logits(of_labels.logits, rows, reader.student_group, groups)
        source = _Source(means, log_sum_exp(means.detach()))
        rows = torch.arange(groups, device=rows.device)
    sees = StudentSees(
        logits=source.logits.detach(),
        lse=source.lse,
        rows=rows,
        vocab=reader.vocab_s,
        token_rows=reader.token_rows,
        token_ids=reader.token_ids,
        token_group=reader.token_group,
    )
    return source, reader.method(sees, _detached(reader.says))


def _detached(says: TeacherSays) -> TeacherSays:
    """Cut a teacher off from gradients, however its logits came about."""
    tokens = None if says.token_logprobs is None else says.token_logprobs.detach()
    return replace(says, top=TopK(says.top.ids, says.top.logprobs.detach()), token_logprobs=tokens)
