"""pass@k: the probability that at least one of k programs passes."""

from __future__ import annotations

from fractions import Fraction
from math import comb

from cdm_toolkit.errors import BadOption


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k for one task.

    The share of all subsets of k samples with at least one that passed (arXiv 2107.03374, eq. 1), computed exactly.
    Raises BadOption where there are fewer samples than k.

    >>> pass_at_k(10, 3, 1)
    0.3
    """
    if not 1 <= k <= samples:
        raise BadOption("k of pass@k", k, f"1 to {samples}, the samples of each task")
    if not 0 <= passed <= samples:
        raise ValueError(f"{passed} of {samples} samples passed")
    return float(1 - Fraction(comb(samples - passed, k), comb(samples, k)))
