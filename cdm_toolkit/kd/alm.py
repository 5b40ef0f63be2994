"""Approximate Likelihood Matching (arXiv 2503.20083): likelihoods of the same piece of text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cdm_toolkit.kd.divergences import NOTHING
from cdm_toolkit.kd.group_likelihoods import every_token, log_likelihoods
from cdm_toolkit.kd.method import Method
from cdm_toolkit.kd.settings import MethodSettings, setting
from cdm_toolkit.kd.types import KDSums, LogprobRequest, StudentLogits, TeacherSignal

CERTAIN = 1e-6
"""Taken off both tempered log-likelihoods, as in the published code: a certain piece of text then leaves its
opposite a probability, and the gradient is finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ALMSettings(MethodSettings):
    """Settings of `ALM`."""

    tau: float = setting(100.0, "Temperature τ of the likelihoods of whole groups.", above=0)


class ALM(Method[ALMSettings, Tensor]):
    """f(p^(1/τ) ‖ q^(1/τ)) + f(1 − p^(1/τ) ‖ 1 − q^(1/τ)) of each group, f(x ‖ y) = x log(x / y).

    p and q are the likelihoods that teacher and student give the group's text: the products of the
    probabilities of its tokens, each given all before it (Minixhofer et al., arXiv 2503.20083; the
    binary cross-entropy of tokenkit has the same gradient). Needs no mapping and no top k. Of the
    publication this leaves out that pieces are dropped whose end one of the tokenizers makes unlikely: each
    aligned group counts.

    `matched_mass` is the teacher's likelihood of the groups' texts, `pairs` counts the groups.
    """

    name = "alm"
    summary = "likelihoods of the same pieces of text, without a map"
    source = "arXiv 2503.20083"
    Settings = ALMSettings
    color, marker = "#009e73", "X"
    reads_teacher_tokens = True
    reads_student_tokens = True

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[Tensor]:
        return every_token(student)

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[Tensor], signal: TeacherSignal
    ) -> KDSums:
        likelihood, of_student = log_likelihoods(logprobs, request, signal)
        student = self._log_chance(of_student)
        return KDSums(
            kd=binary_kl(self._log_chance(likelihood), student).sum(),
            matched_mass=likelihood.exp().sum(),
            pairs=torch.ones_like(student).sum(),
        )

    def _log_chance(self, logprobs: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        # rounding makes a log-probability positive by a hair, and none is -inf times 0
        return logprobs.clamp(min=NOTHING, max=0) / self.settings.tau - CERTAIN


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Give log(1 − exp(x)) for x < 0: each half by the form that loses no digits (Mächler 2012)."""
    return torch.where(x < -math.log(2), torch.log1p(-x.exp()), torch.log(-torch.expm1(x)))


def binary_kl(teacher: Float[Tensor, " group"], student: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
    """Give KL between two coins, of which the logarithms of the chance of heads are given, both below 0."""
    heads = teacher.exp() * (teacher - student)
    return heads - torch.expm1(teacher) * (log1mexp(teacher) - log1mexp(student))
