"""Token weights from next-token entropies (arXiv 2502.11104, section 3.2)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64

from cdm_toolkit.errors import BadOption


def uniform_weights(length: int) -> Int64[np.ndarray, " time"]:
    """Give all tokens the weight 3, as `weights` does where all entropies are equal."""
    return np.full(length, 3, np.int64)


def weights(entropy: Float[np.ndarray, " time"]) -> Int64[np.ndarray, " time"]:
    """Compute token weights from entropies: w = floor(3 + 3·sigmoid(4·minmax(H) − 2)), which is 3, 4 or 5.

    Entropies may be in any unit. Where all are equal, as with a single token, minmax is 0/0 and is taken as
    0 (w = 3): equal weights do not change the path. Raises `BadOption` for an entropy that is not finite.

    >>> weights(np.array([0.0, 1.0, 2.0])).tolist()
    [3, 4, 5]
    >>> weights(np.array([0.7])).tolist()
    [3]
    """
    values = np.asarray(entropy, dtype=np.float64)
    if not np.isfinite(values).all():
        raise BadOption("an entropy", float(values[~np.isfinite(values)][0]), "finite entropies")
    if not len(values):
        return np.zeros(0, np.int64)
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.floor(3 + 3 / (1 + np.exp(2 - 4 * scaled))).astype(np.int64)
