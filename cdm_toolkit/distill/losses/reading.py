"""What the methods have in common: reading ids at each group, and summing up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cdm_toolkit.distill.losses.record import KdParts, Reading, StudentSees
from cdm_toolkit.vocab_map.contextual import matched_mass

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor


def read_groups(
    sees: StudentSees, ids: Int64[Tensor, "group pick"], divergence: Callable[[Tensor], KdParts]
) -> Reading:
    """Read `ids` at the row of each group; `divergence` gets their log-probabilities in one flat list."""
    return Reading(sees.rows.repeat_interleave(ids.shape[1]), ids.flatten(), divergence)


def kd_parts(
    divergence: Float[Tensor, " place"],
    teacher_logprobs: Float[Tensor, "group topk"],
    mask: Bool[Tensor, "group topk"],
) -> KdParts:
    """Sum up over the groups, which may have several places; `mask` marks the teacher's candidates with a partner."""
    return KdParts(
        kd=divergence.sum(),
        matched_mass=matched_mass(mask, teacher_logprobs).sum(),
        pairs=mask.sum().to(divergence.dtype),
    )


def group_sums(
    values: Float[Tensor, " token"], group: Int64[Tensor, " token"], groups: int
) -> Float[Tensor, " group"]:
    """Add up the values of each group's tokens."""
    return values.new_zeros(groups).index_add(0, group, values)
