"""KL over a mapping of the vocabularies that is the same everywhere: exact bytes, edit distance, prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cdm_toolkit.distill.losses.buckets import bucket_kl
from cdm_toolkit.distill.losses.reading import kd_parts, read_groups
from cdm_toolkit.distill.losses.record import KdParts, Reading, StudentSees, TeacherSays, TopK
from cdm_toolkit.vocab_map.types import NO_MATCH

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StaticMapSettings:
    """What a static mapping needs beside the logits."""

    partner: Int64[Tensor, " vocab_t"]
    """The student id of each teacher id, −1 without one."""
    temperature: float = 1.0
    rest_bucket: bool = True


def partners_of(top: TopK, partner: Int64[Tensor, " vocab_t"]) -> Int64[Tensor, "group topk"]:
    """Look up the partner of each candidate, −1 where it has none or no probability."""
    found = partner.index_select(0, top.ids.flatten()).view_as(top.ids)
    return torch.where(top.logprobs > -torch.inf, found, NO_MATCH)


def merged(top: TopK, partners: Int64[Tensor, "group topk"]) -> TopK:
    """Make one outcome of the candidates with one partner: its id, and the log of their joint probability.

    The outcomes of a group come in ascending order of their ids; −1 stands for candidates without a partner,
    and fills up.
    """
    in_order = partners.sort(-1)
    same = in_order.values.diff(dim=-1, prepend=in_order.values.narrow(-1, 0, 1)) == 0
    slots = same.logical_not().cumsum(-1)
    probabilities = top.logprobs.gather(-1, in_order.indices).exp()
    mass = torch.zeros_like(probabilities).scatter_add(-1, slots, probabilities)
    ids = torch.full_like(partners, NO_MATCH).scatter(-1, slots, in_order.values)
    return TopK(ids, mass.clamp(min=torch.finfo(mass.dtype).tiny).log())


def static_map(sees: StudentSees, says: TeacherSays, settings: StaticMapSettings) -> Reading:
    """Give T² KL(teacher ‖ student) over the student ids that the teacher's top k map to.

    Teacher candidates that map to one student id are one outcome with the sum of their probabilities. Both
    distributions are renormalised over the outcomes at temperature T, with all other probability as one more
    where `rest_bucket` is set. With the exact map it is EM (Fu et al., arXiv 2301.12726), with the map of least
    edit distance MinED (FuseLLM, arXiv 2401.10491).
    """
    partners = partners_of(says.top, settings.partner)
    teacher = merged(says.top, partners)

    def divergence(picked: Tensor) -> KdParts:
        between = bucket_kl(
            teacher.logprobs,
            picked.view_as(teacher.logprobs),
            teacher.ids >= 0,
            temperature=settings.temperature,
            rest_bucket=settings.rest_bucket,
        )
        return kd_parts(between, says.top.logprobs, partners >= 0)

    return read_groups(sees, teacher.ids.clamp(min=0), divergence)
