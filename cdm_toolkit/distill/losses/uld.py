"""Universal logit distillation (arXiv 2402.12030): compare sorted probabilities, whatever ids they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cdm_toolkit.distill.losses.buckets import tempered
from cdm_toolkit.distill.losses.pick import top_k
from cdm_toolkit.distill.losses.reading import kd_parts, read_groups
from cdm_toolkit.distill.losses.record import KdParts, Reading, StudentSees, TeacherSays

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class UldSettings:
    """What ULD needs beside the logits."""

    vocab_t: int
    """Ids of the teacher's tokenizer."""
    top_k: int
    """Of the student; the teacher's is what it says."""
    temperature: float = 1.0


def sorted_l1(
    teacher: Float[Tensor, "group topk_t"], student: Float[Tensor, "group topk_s"]
) -> Float[Tensor, " group"]:
    """Sum |teacher - student| over the ranks of descending probabilities; the shorter side ends in zeros."""
    width = max(teacher.shape[-1], student.shape[-1])
    sides = [torch.nn.functional.pad(side, (0, width - side.shape[-1])) for side in (teacher, student)]
    return (sides[0] - sides[1]).abs().sum(-1)


def uld(sees: StudentSees, says: TeacherSays, settings: UldSettings) -> Reading:
    """Give Σ over ranks i of |p_(i) - q_(i)|, the sorted probabilities of teacher and student at temperature T.

    This is the closed form of the Wasserstein distance with a uniform cost (Boizard et al., arXiv 2402.12030), a
    number from 0 to 2, with no T². It differs from the publication in two things:

    - Ranks beyond k are left out. With p and q of mass P and Q beyond k, that is at least |P - Q| and at most
      P + Q, and the student's tail has no gradient of its own. At k of the whole vocabularies nothing is.
      A temperature other than 1 takes all probability beyond k as one outcome.
    - Positions are the aligned groups, where the published one pairs the n-th token with the n-th.

    `matched_mass` is the teacher's probability on the ranks that both sides have, `pairs` counts them.
    """
    teacher = says.top
    student = top_k(
        sees.logits, min(settings.top_k, sees.vocab), real=sees.vocab, rows=sees.rows, lse=sees.lse
    )
    compared = (teacher.logprobs > -torch.inf) & (
        torch.arange(teacher.ids.shape[1], device=teacher.ids.device) < student.ids.shape[1]
    )
    probabilities = tempered(
        teacher.logprobs,
        teacher.logprobs > -torch.inf,
        temperature=settings.temperature,
        complete=teacher.ids.shape[1] == settings.vocab_t,
    ).exp()

    def divergence(picked: Tensor) -> KdParts:
        logprobs = picked.view_as(student.logprobs)
        read = tempered(
            logprobs,
            logprobs > -torch.inf,
            temperature=settings.temperature,
            complete=student.ids.shape[1] == sees.vocab,
        )
        return kd_parts(sorted_l1(probabilities, read.exp()), teacher.logprobs, compared)

    return read_groups(sees, student.ids, divergence)
