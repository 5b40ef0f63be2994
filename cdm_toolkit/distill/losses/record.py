"""What every method gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
class TeacherSays:
    """What a teacher says about the groups of a batch, which are one flat list. None of it has a gradient.

    `top` is the distribution before each group (`boundary`), or that of the mean of its logits (`mean`). Where
    the method looks at whole tokens, `token_logprobs` are the log-probabilities of the tokens that the groups
    hold, each given all before it, and `token_group` says whose they are: ascending, each group has at least
    one.
    """

    top: TopK
    token_logprobs: Float[Tensor, " token_t"] | None = None
    token_group: Int64[Tensor, " token_t"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StudentSees:
    """The student's logits at the groups of a batch, to choose from: detached, so that choosing has no gradient.

    A group reads the row `rows` of `logits`. Of a row, the first `vocab` ids are the tokenizer's, the others
    are padding of the embedding; `lse` is over all. Where the method looks at whole tokens, `token_rows` are the
    rows that predict the tokens that the groups hold, `token_ids` those tokens and `token_group` whose they
    are.
    """

    logits: Float[Tensor, "row vocab_s"]
    lse: Float[Tensor, " row"]
    rows: Int64[Tensor, " group"]
    vocab: int
    token_rows: Int64[Tensor, " token_s"] | None = None
    token_ids: Int64[Tensor, " token_s"] | None = None
    token_group: Int64[Tensor, " token_s"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class KdParts:
    """Sums over the groups of a batch, so that batches add up whatever their sizes. All are scalars.

    `kd` carries the gradient. `matched_mass` is the teacher's probability on ids that have a partner, `pairs`
    counts these ids; methods without partners (`uld`, `alm`) say what they count instead.
    """

    kd: Float[Tensor, ""]
    matched_mass: Float[Tensor, ""]
    pairs: Float[Tensor, ""]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """The log-probabilities that a method reads of the student, and what it makes of them.

    `divergence` is given log softmax(logits)[rows, ids], differentiable, and sums up its groups. Methods say
    what they read instead of reading it, so that the labels and all teachers share one pass over the logits
    and one gradient tensor.
    """

    rows: Int64[Tensor, " pick"]
    ids: Int64[Tensor, " pick"]
    divergence: Callable[[Tensor], KdParts]


Method = Callable[[StudentSees, TeacherSays], Reading]


@dataclass(frozen=True, slots=True, eq=False)
class LossParts:
    """Sums over a batch: cross-entropy in nats over its labels, and KD over the groups of each teacher.

    `label_logprobs`, detached, are what `ce` is the negative sum of: they tell which label is not finite.
    """

    ce: Float[Tensor, ""]
    kd: tuple[KdParts, ...]
    label_logprobs: Float[Tensor, " token"]


def objective(
    parts: LossParts,
    *,
    alpha: float,
    weights: Sequence[float],
    tokens: Tensor | float,
    positions: Sequence[Tensor | float],
) -> Float[Tensor, ""]:
    """Combine the sums of a batch: alpha CE / tokens + (1 - alpha) Σ weight KD / positions, over teachers.

    `tokens` and `positions` count the labels and each teacher's groups of the *whole* optimizer step, all its
    batches and processes: the losses of the parts of a step then add up to the loss of the step. A position
    without a pair counts: how many pairs a position has is known only after the forward pass.
    """

    def mean(total: Tensor, count: Tensor | float) -> Tensor:
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)

    loss = alpha * mean(parts.ce, tokens)
    for weight, kd, count in zip(weights, parts.kd, positions, strict=True):
        loss = loss + (1 - alpha) * weight * mean(kd.kd, count)
    return loss
