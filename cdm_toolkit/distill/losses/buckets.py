"""Divergence of two distributions over the same few outcomes, and the rest of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

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


def bucket_kl(
    teacher_logprobs: Float[Tensor, "group pairs"],
    student_logprobs: Float[Tensor, "group pairs"],
    mask: Bool[Tensor, "group pairs"],
    *,
    temperature: float = 1.0,
    rest_bucket: bool = True,
) -> Float[Tensor, " group"]:
    """Give T² KL(teacher ‖ student) over matched pairs, in nats (Hinton et al., arXiv 1503.02531, section 2).

    0 where the two agree, and where there is no pair. Without the rest bucket a single pair is a distribution
    over one outcome: also 0, whatever the two models think.

    >>> p = torch.tensor([[0.7, 0.2]]).log(); both = torch.ones(1, 2, dtype=torch.bool)
    >>> bucket_kl(p, p, both).tolist()
    [0.0]
    """
    teacher = outcomes(teacher_logprobs, mask, temperature=temperature, rest_bucket=rest_bucket)
    student = outcomes(student_logprobs, mask, temperature=temperature, rest_bucket=rest_bucket)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)
