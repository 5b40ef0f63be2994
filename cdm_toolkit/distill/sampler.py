"""Sampler: the order in which rows are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int64

WINDOW = 50
"""Steps whose rows are sorted together."""


def epoch_order(
    lengths: Int64[np.ndarray, " row"], *, rows_per_step: int, seed: int, epoch: int, group_by_length: bool
) -> Int64[np.ndarray, " row"]:
    """Shuffle the rows of an epoch; `group_by_length` makes steps of rows of similar length, and shuffles the steps.

    The order depends on the arguments alone, so that a run that goes on in mid-epoch finds the same.

    >>> epoch_order(np.array([1, 9, 1, 9, 1, 9]), rows_per_step=3, seed=0, epoch=0, group_by_length=True).tolist()
    [3, 5, 1, 2, 4, 0]
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    if not group_by_length:
        return order
    steps = []
    for first in range(0, len(order), WINDOW * rows_per_step):
        window = order[first : first + WINDOW * rows_per_step]
        window = window[np.argsort(lengths[window], kind="stable")]
        steps += [window[at : at + rows_per_step] for at in range(0, len(window), rows_per_step)]
    whole = [step for step in steps if len(step) == rows_per_step]
    short = [step for step in steps if len(step) < rows_per_step]  # one at most, which stays last
    return np.concatenate([*(whole[nth] for nth in generator.permutation(len(whole))), *short])


class LengthGroupedSampler:
    """A sampler for a DataLoader that asks for the epoch each time it begins anew."""

    def __init__(
        self,
        lengths: Int64[np.ndarray, " row"],
        *,
        rows_per_step: int,
        seed: int,
        group_by_length: bool,
        epoch: Callable[[], int],
    ) -> None:
        self.lengths, self.rows_per_step, self.seed, self.group_by_length = (
            lengths,
            rows_per_step,
            seed,
            group_by_length,
        )
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(
            self.lengths,
            rows_per_step=self.rows_per_step,
            seed=self.seed,
            epoch=self.epoch(),
            group_by_length=self.group_by_length,
        )
        return iter(order.tolist())
