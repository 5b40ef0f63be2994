"""Contextual dynamic mapping (arXiv 2502.11104): the pairs of ids are chosen anew at each position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cdm_toolkit.distill.losses.buckets import bucket_kl
from cdm_toolkit.distill.losses.pick import log_probs, log_sum_exp, top_k, values_at
from cdm_toolkit.distill.losses.record import Gathered, LossParts, TopK
from cdm_toolkit.vocab_map.contextual import PairTable, matched_mass, select_pairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CdmSettings:
    """What CDM needs beside the logits."""

    table: PairTable
    exact: Int64[Tensor, " vocab_t"] | None
    """The student id with the same bytes or role, −1 without one: a candidate wherever the student ranks it.
    None leaves the student's candidates at its top k."""
    vocab_s: int
    """Ids of the student's tokenizer; logits beyond are padding."""
    top_k: int
    temperature: float
    rest_bucket: bool


def with_exact_partners(
    student: TopK,
    teacher: TopK,
    exact: Int64[Tensor, " vocab_t"],
    logprobs: Callable[[Tensor], Tensor],
    size: int,
) -> TopK:
    """Add the exact partners of the teacher's candidates to the student's, best first; −1 fills up.

    `logprobs` gives the student's log-probabilities of ids [group, topk]; its vocabulary has `size` ids.
    """
    partners = exact.index_select(0, teacher.ids.flatten()).view_as(teacher.ids)
    in_order = student.ids.sort(-1).values
    at = torch.searchsorted(in_order, partners).clamp(max=in_order.shape[-1] - 1)
    new = (partners >= 0) & (in_order.gather(-1, at) != partners)
    added = torch.where(new, logprobs(partners.clamp(min=0)), -torch.inf)
    ids = torch.cat((student.ids, torch.where(new, partners, -1)), dim=-1)
    order = torch.cat((student.logprobs, added), dim=-1).sort(dim=-1, descending=True, stable=True)
    width = min(size, ids.shape[1])
    return TopK(ids.gather(-1, order.indices.narrow(1, 0, width)), order.values.narrow(1, 0, width))


def mean_logits(
    logits: Float[Tensor, "token vocab"],
    rows: Int64[Tensor, " row"],
    group: Int64[Tensor, " row"],
    groups: int,
) -> Float[Tensor, "group vocab"]:
    """Average the rows of each group: the paper's logits of tokens that are aligned together."""
    ones = torch.ones_like(group, dtype=torch.promote_types(logits.dtype, torch.float32))
    counts = ones.new_zeros(groups).index_add(0, group, ones)
    weights = (1 / counts).index_select(0, group).to(logits.dtype).unsqueeze(-1)
    return logits.new_zeros(groups, logits.shape[1]).index_add(
        0, group, logits.index_select(0, rows) * weights
    )


def cdm(inputs: Gathered, settings: CdmSettings) -> LossParts:
    """Sum cross-entropy over the labels, and T² KL(teacher ‖ student) on matched pairs over the groups.

    At each group the pairs are selected among the top k of both models (arXiv 2502.11104, section 3.3); both
    distributions are renormalised over the pairs at temperature T, with the unmatched probability as one more
    outcome where `rest_bucket` is set. The gradient reaches the student's logits only.
    """
    assert inputs.teacher is not None
    assert inputs.student_rows is not None
    logits, labels, teacher = inputs.student_logits, inputs.labels, inputs.teacher
    rows = torch.arange(len(labels), device=labels.device)
    lse = log_sum_exp(logits.detach())
    if inputs.student_group is None:
        source, source_rows, source_lse = logits, inputs.student_rows, lse
    else:
        source = mean_logits(logits, inputs.student_rows, inputs.student_group, len(teacher.ids))
        source_rows = torch.arange(len(source), device=logits.device)
        source_lse = log_sum_exp(source.detach())

    student = top_k(source.detach(), settings.top_k, real=settings.vocab_s, rows=source_rows, lse=source_lse)
    if settings.exact is not None:

        def of_student(ids: Tensor) -> Tensor:
            where = source_rows.repeat_interleave(ids.shape[1])
            picked = values_at(source.detach(), where, ids.flatten()) - source_lse.index_select(0, where)
            return picked.view_as(ids)

        student = with_exact_partners(student, teacher, settings.exact, of_student, settings.vocab_s)
    pairs = select_pairs(settings.table, teacher.ids, teacher.logprobs, student.ids, student.logprobs)

    # a pair for each of the teacher's candidates; where there is none the mask keeps id 0 out of everything
    pair_rows = source_rows.repeat_interleave(pairs.mask.shape[1])
    pair_ids = pairs.student_ids.clamp(min=0).flatten()
    if source is logits:  # one pick, so that one gradient tensor of the logits' shape is written
        picked = log_probs(logits, lse, torch.cat((rows, pair_rows)), torch.cat((labels, pair_ids)))
        label_logprobs, student_logprobs = picked.split((len(rows), len(pair_rows)))
    else:
        label_logprobs = log_probs(logits, lse, rows, labels)
        student_logprobs = log_probs(source, source_lse, pair_rows, pair_ids)
    divergence = bucket_kl(
        teacher.logprobs,
        student_logprobs.view_as(teacher.logprobs),
        pairs.mask,
        temperature=settings.temperature,
        rest_bucket=settings.rest_bucket,
    )
    return LossParts(
        ce=-label_logprobs.sum(),
        kd=divergence.sum(),
        matched_mass=matched_mass(pairs.mask, teacher.logprobs).sum(),
        pairs=pairs.mask.sum(),
    )
