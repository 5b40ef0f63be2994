"""Teacher and student of one tokenizer: divergences over the same ids, no mapping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from cdm_toolkit.distill.losses.buckets import generalised_jsd, kl, outcomes
from cdm_toolkit.distill.losses.reading import kd_parts, read_groups
from cdm_toolkit.distill.losses.record import KdParts, Reading, StudentSees, TeacherSays

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Kind = Literal["kl", "reverse-kl", "jsd"]


@dataclass(frozen=True, slots=True)
class SharedSettings:
    """What the divergences of one tokenizer need beside the logits."""

    kind: Kind
    temperature: float = 1.0
    beta: float = 0.5
    """Of `jsd`."""


def shared(sees: StudentSees, says: TeacherSays, settings: SharedSettings) -> Reading:
    """Give T² D(teacher, student) over the teacher's top k and all other ids as one outcome.

    D is KL(teacher ‖ student) (Hinton et al., arXiv 1503.02531), KL(student ‖ teacher) (Gu et al.,
    arXiv 2306.08543) or the generalised JSD (Agarwal et al., arXiv 2306.13649, equation 1; published without
    T²). Where k is the vocabulary nothing is left for the one outcome and D is exact; where it is less, D is at
    most what it is over all ids.
    """
    top = says.top
    mask = top.logprobs > -torch.inf
    rest = top.ids.shape[1] < sees.vocab
    teacher = outcomes(top.logprobs, mask, temperature=settings.temperature, rest_bucket=rest)

    def divergence(picked: Tensor) -> KdParts:
        logprobs = picked.view_as(top.logprobs)
        student = outcomes(logprobs, mask, temperature=settings.temperature, rest_bucket=rest)
        between = settings.temperature**2 * _between(teacher, student, settings)
        return kd_parts(between, top.logprobs, mask)

    return read_groups(sees, top.ids, divergence)


def _between(
    teacher: Float[Tensor, "group outcome"], student: Float[Tensor, "group outcome"], settings: SharedSettings
) -> Float[Tensor, " group"]:
    if settings.kind == "kl":
        return kl(teacher, student)
    if settings.kind == "reverse-kl":
        return kl(student, teacher)
    return generalised_jsd(teacher, student, settings.beta)
