"""Approximate likelihood matching (arXiv 2503.20083): the likelihoods of the same piece of text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cdm_toolkit.distill.losses.buckets import NOTHING
from cdm_toolkit.distill.losses.reading import group_sums
from cdm_toolkit.distill.losses.record import KdParts, Reading, StudentSees, TeacherSays

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

CERTAIN = 1e-6
"""Taken off both tempered log-likelihoods, as in the published code: a certain piece of text then leaves its
opposite a probability, and the gradient is finite."""


@dataclass(frozen=True, slots=True)
class AlmSettings:
    """What ALM needs beside the logits."""

    tau: float = 100.0


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Give log(1 - exp(x)) for x < 0: each half by the form that loses no digits (Mächler 2012)."""
    return torch.where(x < -math.log(2), torch.log1p(-x.exp()), torch.log(-torch.expm1(x)))


def binary_kl(teacher: Float[Tensor, " group"], student: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
    """Give KL between two coins, of which the logarithms of the chance of heads are given, both below 0."""
    heads = teacher.exp() * (teacher - student)
    return heads - torch.expm1(teacher) * (log1mexp(teacher) - log1mexp(student))


def alm(sees: StudentSees, says: TeacherSays, settings: AlmSettings) -> Reading:
    """Give f(p^(1/τ) ‖ q^(1/τ)) + f(1 - p^(1/τ) ‖ 1 - q^(1/τ)) of each group, f(x ‖ y) = x log(x / y).

    p and q are the likelihoods that teacher and student give the group's text: the products of the
    probabilities of its tokens, each given all before it (Minixhofer et al., arXiv 2503.20083; the
    binary cross-entropy of tokenkit has the same gradient). Needs no mapping and no top k. Of the
    publication this leaves out that pieces are dropped whose end one of the tokenizers makes unlikely: each
    aligned group counts.

    `matched_mass` is the teacher's likelihood of the groups' texts, `pairs` counts the groups.
    """
    assert says.token_logprobs is not None
    assert says.token_group is not None
    assert sees.token_rows is not None
    assert sees.token_ids is not None
    token_group, groups = sees.token_group, len(says.top.ids)
    likelihood = group_sums(says.token_logprobs, says.token_group, groups)

    def log_chance(logprobs: Tensor) -> Tensor:
        # rounding makes a log-probability positive by a hair, and none is -inf times 0
        return logprobs.clamp(min=NOTHING, max=0) / settings.tau - CERTAIN

    def divergence(picked: Tensor) -> KdParts:
        student = log_chance(group_sums(picked, token_group, groups))
        return KdParts(
            kd=binary_kl(log_chance(likelihood), student).sum(),
            matched_mass=likelihood.exp().sum(),
            pairs=torch.ones_like(student).sum(),
        )

    return Reading(sees.token_rows, sees.token_ids, divergence)
