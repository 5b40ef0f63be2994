"""Sampler: the order in which rows are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float64, Int64

WINDOW = 50
"""Steps whose rows are sorted together."""


def rows_of_epoch(
    weights: Float64[np.ndarray, " row"], generator: np.random.Generator
) -> Int64[np.ndarray, " _"]:
    """List the rows of an epoch: each as often as its weight says, by the generator where that is no whole number.

    There are equally many in every epoch.

    >>> rows_of_epoch(np.array([2.0, 1.0, 0.5, 0.5]), np.random.default_rng(0)).tolist()
    [0, 0, 1, 2]
    """
    times = weights.astype(np.int64)
    for weight in np.unique(weights[weights != times]):
        some = np.flatnonzero(weights == weight)
        times[generator.permutation(some)[: round(weight % 1 * len(some))]] += 1
    return np.repeat(np.arange(len(weights)), times)


def epoch_order(
    lengths: Int64[np.ndarray, " row"],
    *,
    rows_per_step: int,
    seed: int,
    epoch: int,
    group_by_length: bool,
    weights: Float64[np.ndarray, " row"] | None = None,
) -> Int64[np.ndarray, " _"]:
    """Shuffle the rows of an epoch; `group_by_length` makes steps of rows of similar length, and shuffles the steps.

    `weights` say how often each row comes, once without them. The order depends on the arguments alone, so that a run
    that goes on in mid-epoch finds the same.

    >>> epoch_order(np.array([1, 9, 1, 9, 1, 9]), rows_per_step=3, seed=0, epoch=0, group_by_length=True).tolist()
    [3, 5, 1, 2, 4, 0]
    """
    generator = np.random.default_rng((seed, epoch))
    rows = np.arange(len(lengths)) if weights is None else rows_of_epoch(weights, generator)
    order = rows[generator.permutation(len(rows))]
    if not group_by_length or not len(order):
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
        weights: Float64[np.ndarray, " row"] | None = None,
    ) -> None:
        self.lengths, self.rows_per_step, self.seed, self.group_by_length = (
            lengths,
            rows_per_step,
            seed,
            group_by_length,
        )
        self.epoch, self.weights = epoch, weights

    def __len__(self) -> int:
        if self.weights is None:
            return len(self.lengths)
        return len(rows_of_epoch(self.weights, np.random.default_rng(self.seed)))

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(
            self.lengths,
            rows_per_step=self.rows_per_step,
            seed=self.seed,
            epoch=self.epoch(),
            group_by_length=self.group_by_length,
            weights=self.weights,
        )
        return iter(order.tolist())
