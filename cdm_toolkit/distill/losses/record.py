"""What every method gets and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The likeliest ids of a position, best first, with their log-probabilities over the whole vocabulary."""

    ids: Int64[Tensor, "group topk"]
    logprobs: Float[Tensor, "group topk"]


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """The inputs of a loss, gathered at the positions that need them; a batch is one flat list of positions.

    `student_logits` are those that predict `labels`. Where there is a teacher, a group reads the row
    `student_rows` of them (`boundary`), or the mean of the rows whose `student_group` is its index (`mean`).
    """

    student_logits: Float[Tensor, "token vocab_s"]
    labels: Int64[Tensor, " token"]
    student_rows: Int64[Tensor, " row"] | None = None
    student_group: Int64[Tensor, " row"] | None = None
    teacher: TopK | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LossParts:
    """Sums over a batch, so that batches add up whatever their sizes. All are scalars.

    `ce` in nats over the labels, `kd` over the groups; `matched_mass` is the teacher's probability on ids
    that have a pair, summed over the groups, and `pairs` counts those pairs. Only `ce` and `kd` carry a
    gradient.
    """

    ce: Float[Tensor, ""]
    kd: Float[Tensor, ""]
    matched_mass: Float[Tensor, ""]
    pairs: Float[Tensor, ""]


Method = Callable[[Gathered], LossParts]


def objective(
    parts: LossParts, *, alpha: float, tokens: Tensor | float, positions: Tensor | float
) -> Float[Tensor, ""]:
    """Combine the sums of a batch: alpha CE / tokens + (1 - alpha) KD / positions.

    `tokens` and `positions` count the labels and the groups of the *whole* optimizer step, all its batches
    and processes: the losses of the parts of a step then add up to the loss of the step. A position without a
    pair counts: how many pairs a position has is known only after the forward pass.
    """

    def mean(total: Tensor, count: Tensor | float) -> Tensor:
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)

    return alpha * mean(parts.ce, tokens) + (1 - alpha) * mean(parts.kd, positions)
