"""In which order rows are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int64

WINDOW = 50
"""Steps whose rows are sorted together."""


def epoch_order(
    lengths: Int64[np.ndarray, " row"], *, rows_a_step: int, seed: int, epoch: int, bucket: bool
) -> Int64[np.ndarray, " row"]:
    """Shuffle the rows of an epoch; `bucket` makes steps of rows of like length, and shuffles the steps.

    The order depends on the arguments alone, so that a run that goes on in mid-epoch finds the same.

    >>> epoch_order(np.array([1, 9, 1, 9, 1, 9]), rows_a_step=3, seed=0, epoch=0, bucket=True).tolist()
    [3, 5, 1, 2, 4, 0]
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    if not bucket:
        return order
    steps = []
    for first in range(0, len(order), WINDOW * rows_a_step):
        window = order[first : first + WINDOW * rows_a_step]
        window = window[np.argsort(lengths[window], kind="stable")]
        steps += [window[at : at + rows_a_step] for at in range(0, len(window), rows_a_step)]
    whole = [step for step in steps if len(step) == rows_a_step]
    short = [step for step in steps if len(step) < rows_a_step]  # one at most, which stays last
    return np.concatenate([*(whole[nth] for nth in generator.permutation(len(whole))), *short])


class EpochOrder:
    """A sampler for a DataLoader that asks for the epoch each time it begins anew."""

    def __init__(
        self,
        lengths: Int64[np.ndarray, " row"],
        *,
        rows_a_step: int,
        seed: int,
        bucket: bool,
        epoch: Callable[[], int],
    ) -> None:
        self.lengths, self.rows_a_step, self.seed, self.bucket = lengths, rows_a_step, seed, bucket
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(
            self.lengths,
            rows_a_step=self.rows_a_step,
            seed=self.seed,
            epoch=self.epoch(),
            bucket=self.bucket,
        )
        return iter(order.tolist())
