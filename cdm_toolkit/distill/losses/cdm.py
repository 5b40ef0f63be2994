"""Contextual dynamic mapping (arXiv 2502.11104): the pairs of ids are chosen anew at each position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from cdm_toolkit.distill.losses.buckets import bucket_kl
from cdm_toolkit.distill.losses.pick import top_k, values_at
from cdm_toolkit.distill.losses.reading import kd_parts, read_groups
from cdm_toolkit.distill.losses.record import KdParts, Reading, StudentSees, TeacherSays, TopK
from cdm_toolkit.vocab_map.contextual import PairTable, select_pairs

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


def cdm(sees: StudentSees, says: TeacherSays, settings: CdmSettings) -> Reading:
    """Give T² KL(teacher ‖ student) on the pairs of each group (arXiv 2502.11104, section 3.3).

    The pairs are selected among the top k of both models; both distributions are renormalised over the pairs
    at temperature T, with the unmatched probability as one more outcome where `rest_bucket` is set.
    """
    teacher = says.top
    student = top_k(sees.logits, settings.top_k, real=sees.vocab, rows=sees.rows, lse=sees.lse)
    if settings.exact is not None:
        student = with_exact_partners(student, teacher, settings.exact, partial(_log_probs, sees), sees.vocab)
    pairs = select_pairs(settings.table, teacher.ids, teacher.logprobs, student.ids, student.logprobs)

    def divergence(picked: Tensor) -> KdParts:
        between = bucket_kl(
            teacher.logprobs,
            picked.view_as(teacher.logprobs),
            pairs.mask,
            temperature=settings.temperature,
            rest_bucket=settings.rest_bucket,
        )
        return kd_parts(between, teacher.logprobs, pairs.mask)

    # a pair for each of the teacher's candidates; where there is none the mask keeps id 0 out of everything
    return read_groups(sees, pairs.student_ids.clamp(min=0), divergence)


def _log_probs(sees: StudentSees, ids: Int64[Tensor, "group topk"]) -> Float[Tensor, "group topk"]:
    rows = sees.rows.repeat_interleave(ids.shape[1])
    picked = values_at(sees.logits, rows, ids.flatten()) - sees.lse.index_select(0, rows)
    return picked.view_as(ids)
