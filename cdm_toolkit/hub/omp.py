"""Embedding rows for a new vocabulary from a donor model that has it, by orthogonal matching pursuit.

A donor's row is written as a sparse combination of the donor's rows of tokens that the old vocabulary has too. The same
combination of the old model's rows of these tokens is the new row (arXiv 2506.06607).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from cdm_toolkit.errors import CdmError
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.row_sources import partners
from cdm_toolkit.vocab_map.types import NO_MATCH

TARGETS_AT_ONCE = 256
"""Rows that are approximated together: their correlations with all shared tokens exist at one time."""
DEPENDENT = 1e-6
"""Share of a row's norm outside the span of the chosen ones below which it adds nothing to them."""


@dataclass(frozen=True, slots=True)
class Donor:
    """A model with embeddings for the new vocabulary, by alias, folder or hub id; `k` rows make a new one."""

    model: str
    k: int = 64


@dataclass(frozen=True, slots=True, eq=False)
class SharedTokens:
    """What a donor's vocabulary shares with the old one and with the new ids that lack a row."""

    targets_new: Int64[np.ndarray, " target"]
    """New ids without a row that the donor has."""
    targets_donor: Int64[np.ndarray, " target"]
    """The donor's ids of these."""
    shared_old: Int64[np.ndarray, " shared"]
    """Old ids of the ordinary tokens that the donor has."""
    shared_donor: Int64[np.ndarray, " shared"]
    """The donor's ids of these."""


def shared_tokens(donor: TokenizerView, old: TokenizerView, new: TokenizerView) -> SharedTokens:
    """Find the donor's tokens among the old ids, and among the new ids that the old vocabulary lacks (`partners`).

    Raises CdmError where donor and old model share no token.
    """
    old_of_donor, donor_of_new = partners(old, donor), partners(donor, new)
    targets = np.flatnonzero((partners(old, new) == NO_MATCH) & (donor_of_new != NO_MATCH))
    shared = np.flatnonzero((old_of_donor != NO_MATCH) & ~donor.is_special)
    if not len(shared):
        raise CdmError(
            f"the donor {donor.name} shares no token with {old.name}", fix="give another model as `donor`"
        )
    return SharedTokens(targets, donor_of_new[targets], old_of_donor[shared], shared)


def rows_by_omp(
    old: Shaped[Tensor, "rows_old hidden"],
    donor: Shaped[Tensor, "rows_donor hidden_donor"],
    tokens: SharedTokens,
    k: int,
) -> Shaped[Tensor, "target hidden"]:
    """Approximate the donor's rows of the targets by its rows of shared tokens, and build them of the old rows.

    Computed in float32 or better; the result has the dtype of `old`.
    """

    def rows(table: Tensor, ids: Int64[np.ndarray, " some"]) -> Tensor:
        return table[torch.from_numpy(ids)].to(torch.promote_types(table.dtype, torch.float32))

    atoms, images = rows(donor, tokens.shared_donor), rows(old, tokens.shared_old)
    made = old.new_empty(len(tokens.targets_donor), old.shape[1])
    for begin in range(0, len(made), TARGETS_AT_ONCE):
        part = slice(begin, begin + TARGETS_AT_ONCE)
        chosen, coefficients = matching_pursuit(rows(donor, tokens.targets_donor[part]), atoms, k)
        made[part] = torch.einsum("tk,tkh->th", coefficients.to(images.dtype), images[chosen])
    return made


def matching_pursuit(
    targets: Float[Tensor, "target hidden"], atoms: Float[Tensor, "atom hidden"], k: int
) -> tuple[Shaped[Tensor, "target chosen"], Float[Tensor, "target chosen"]]:
    """Choose k atoms for each target, one at a time, and return their indices and least-squares coefficients.

    The next atom is the one of largest absolute inner product with the residual, which is what is left of the target
    outside the span of those chosen before (arXiv 2506.06607, algorithm 1; Pati et al. 1993). With fewer than k atoms
    all are chosen. An atom inside that span has the coefficient 0.
    """
    count, steps = len(targets), min(k, len(atoms))
    chosen = torch.zeros(count, steps, dtype=torch.long, device=targets.device)
    basis = targets.new_zeros(count, steps, targets.shape[1])
    triangle = targets.new_zeros(count, steps, steps)  # atoms = triangleᵀ basis, as QR has it
    residual = targets.clone()
    for step in range(steps):
        correlation = (residual @ atoms.T).abs_().scatter_(1, chosen[:, :step], -1)
        chosen[:, step] = correlation.argmax(1)
        new = atoms[chosen[:, step]]
        before, rest = basis[:, :step], new.clone()
        for _ in range(2):  # Gram-Schmidt loses orthogonality; twice is enough
            along = before @ rest[..., None]
            rest -= (before.mT @ along)[..., 0]
            triangle[:, :step, step] += along[..., 0]
        norm = rest.norm(dim=1, keepdim=True)
        adds = norm > DEPENDENT * new.norm(dim=1, keepdim=True)
        basis[:, step] = torch.where(adds, rest / norm, 0)
        triangle[:, step, step] = torch.where(adds, norm, 1)[:, 0]
        residual -= (residual * basis[:, step]).sum(1, keepdim=True) * basis[:, step]
    coefficients = torch.linalg.solve_triangular(triangle, basis @ targets[..., None], upper=True)
    return chosen, coefficients[..., 0]
