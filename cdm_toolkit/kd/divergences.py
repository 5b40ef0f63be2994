"""Divergences of two distributions over the same few outcomes and a rest, and their sums over a batch."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cdm_toolkit.kd.settings import Divergence
from cdm_toolkit.kd.types import KDSums
from cdm_toolkit.vocab_map.contextual import matched_mass

NOTHING = -1e9
"""Log-probability of an outcome that is not there: finite, so that 0 times it is 0."""
FULL = -1e-6
"""Largest log of a matched mass that leaves a rest: above it float32 cannot tell the rest from 0."""


def matched_log_mass(
    logprobs: Float[Tensor, "group pairs"], mask: Bool[Tensor, "group pairs"]
) -> Float[Tensor, " group"]:
    """Give the log of the probability on the outcomes in `mask`; near -1e9 where there is none."""
    return logprobs.masked_fill(mask.logical_not(), NOTHING).logsumexp(-1)


def outcomes(
    logprobs: Float[Tensor, "group pairs"],
    mask: Bool[Tensor, "group pairs"],
    *,
    temperature: float,
    rest_bucket: bool,
) -> Float[Tensor, "group outcome"]:
    """Renormalise the outcomes in `mask` at a temperature; `rest_bucket` makes all others one more.

    The rest is summed up before the temperature is applied, so that it needs no more of the distribution than
    its log-probabilities at temperature 1.
    """
    kept = logprobs.masked_fill(mask.logical_not(), NOTHING)
    if rest_bucket:
        matched = matched_log_mass(logprobs, mask).clamp(max=FULL)
        kept = torch.cat((kept, torch.log(-torch.expm1(matched)).unsqueeze(-1)), dim=-1)
    return (kept / temperature).log_softmax(-1)


def tempered(
    logprobs: Float[Tensor, "group pairs"],
    mask: Bool[Tensor, "group pairs"],
    *,
    temperature: float,
    complete: bool,
) -> Float[Tensor, "group pairs"]:
    """Apply a temperature to the whole distribution that the outcomes in `mask` are a part of.

    All other outcomes are one in this, so that the result is exact at temperature 1, and at any where the
    outcomes are `complete`: then nothing else has a probability.
    """
    every = outcomes(logprobs, mask, temperature=temperature, rest_bucket=not complete)
    return every.narrow(-1, 0, mask.shape[-1])


def kl(p: Float[Tensor, "group outcome"], q: Float[Tensor, "group outcome"]) -> Float[Tensor, " group"]:
    """Give KL(p ‖ q) of two distributions in logarithms, in nats."""
    return (p.exp() * (p - q)).sum(-1)


def generalised_jsd(
    teacher: Float[Tensor, "group outcome"], student: Float[Tensor, "group outcome"], beta: float
) -> Float[Tensor, " group"]:
    """Give β KL(teacher ‖ m) + (1 - β) KL(student ‖ m), m = β teacher + (1 - β) student, in logarithms.

    arXiv 2306.13649, equation 1, for 0 < β < 1. Divided by β, as β → 0, it is KL(teacher ‖ student); divided by
    1 - β, as β → 1, it is KL(student ‖ teacher). At each outcome it is at least 0, also where the two do not sum
    to 1.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def bucket_divergence(
    teacher_logprobs: Float[Tensor, "group pairs"],
    student_logprobs: Float[Tensor, "group pairs"],
    mask: Bool[Tensor, "group pairs"],
    *,
    temperature: float = 1.0,
    rest_bucket: bool = True,
    divergence: Divergence = "kl",
    beta: float = 0.5,
) -> Float[Tensor, " group"]:
    """Give T² D(teacher, student) over matched pairs, in nats (Hinton et al., arXiv 1503.02531, section 2).

    D is KL(teacher ‖ student), KL(student ‖ teacher) or the generalised JSD with `beta` (arXiv 2306.13649). 0 where the
    two agree, and where there is no pair. Without the rest bucket a single pair is a distribution over one outcome:
    also 0, whatever the two models think.

    >>> p = torch.tensor([[0.7, 0.2]]).log(); both = torch.ones(1, 2, dtype=torch.bool)
    >>> bucket_divergence(p, p, both).tolist()
    [0.0]
    """
    teacher = outcomes(teacher_logprobs, mask, temperature=temperature, rest_bucket=rest_bucket)
    student = outcomes(student_logprobs, mask, temperature=temperature, rest_bucket=rest_bucket)
    if divergence == "jsd":
        apart = generalised_jsd(teacher, student, beta)
    else:
        apart = kl(teacher, student) if divergence == "kl" else kl(student, teacher)
    return temperature**2 * apart


def kd_sums(
    divergence: Float[Tensor, " position"],
    teacher_logprobs: Float[Tensor, "group topk"],
    matched: Bool[Tensor, "group topk"],
) -> KDSums:
    """Sum over the groups, which may have several positions; `matched` marks teacher candidates with a match."""
    return KDSums(
        kd=divergence.sum(),
        matched_mass=matched_mass(matched, teacher_logprobs).sum(),
        pairs=matched.sum().to(divergence.dtype),
    )


def group_sums(
    values: Float[Tensor, " token"], group: Int64[Tensor, " token"], groups: int
) -> Float[Tensor, " group"]:
    """Add up the values of each group's tokens."""
    return values.new_zeros(groups).index_add(0, group, values)


def first_and_count(
    group: Int64[Tensor, " token"], groups: int
) -> tuple[Int64[Tensor, " group"], Int64[Tensor, " group"]]:
    """Give the index of each group's first token, and how many it has; `group` is ascending."""
    every = torch.arange(groups, device=group.device)
    first = torch.searchsorted(group, every)
    return first, torch.searchsorted(group, every, right=True) - first
