"""Samplers: the order in which rows are trained on, and what is a batch."""

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


def token_batches(
    order: Int64[np.ndarray, " _"],
    lengths: Int64[np.ndarray, " row"],
    *,
    tokens: int,
    packed: bool,
    window: int,
) -> list[list[int]]:
    """Fill batches with rows of an order up to so many tokens; a longer row is a batch of its own.

    `packed` rows cost their lengths. Padded ones cost that of the longest each, and are therefore sorted by length
    first, `window` rows of the order at a time.

    >>> lengths = np.array([1, 9, 1, 9, 1, 9])
    >>> token_batches(np.arange(6), lengths, tokens=10, packed=True, window=6)
    [[0, 1], [2, 3], [4, 5]]
    >>> token_batches(np.arange(6), lengths, tokens=10, packed=False, window=6)
    [[0, 2, 4], [1], [3], [5]]
    """
    if not packed:
        windows = (order[first : first + window] for first in range(0, len(order), window))
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in windows])
    made: list[list[int]] = []
    cost = longest = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        longest = max(longest, length)
        cost = cost + length if packed else longest * (len(made[-1]) + 1 if made else 1)
        if not made or cost > tokens:
            made.append([])
            cost = longest = length
        made[-1].append(row)
    return made


def evened(batches: list[list[int]], count: int) -> list[list[int]]:
    """Split the batches of the most rows, or join those of the fewest, until there are `count`.

    >>> evened([[1, 2, 3], [4], [5]], 4), evened([[1, 2, 3], [4], [5]], 2)
    ([[4], [5], [1], [2, 3]], [[4, 5], [1, 2, 3]])
    """
    made = sorted(batches, key=len)
    while len(made) < count and len(made[-1]) > 1:
        most = made.pop()
        made += [most[: len(most) // 2], most[len(most) // 2 :]]
        made.sort(key=len)
    while len(made) > max(count, 1):
        made = sorted([made[0] + made[1], *made[2:]], key=len)
    return made


class TokenBatchSampler:
    """Batches of about so many tokens of the longest side, padding included; equally many in every epoch."""

    def __init__(
        self,
        lengths: Int64[np.ndarray, " row"],
        *,
        tokens: int,
        packed: bool,
        batches_per_step: int,
        seed: int,
        epoch: Callable[[], int],
        weights: Float64[np.ndarray, " row"] | None = None,
    ) -> None:
        self.lengths, self.tokens, self.packed = lengths, tokens, packed
        self.seed, self.epoch, self.weights = seed, epoch, weights
        first = self._filled(np.random.default_rng((seed, 0)))
        self.count = max(len(first) // batches_per_step, 1) * batches_per_step

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch()))
        batches = evened(self._filled(generator), self.count)
        return iter([batches[nth] for nth in generator.permutation(len(batches))])

    def _filled(self, generator: np.random.Generator) -> list[list[int]]:
        rows = (
            np.arange(len(self.lengths)) if self.weights is None else rows_of_epoch(self.weights, generator)
        )
        window = WINDOW * max(1, self.tokens // max(1, int(self.lengths.mean())))
        order = rows[generator.permutation(len(rows))]
        return token_batches(order, self.lengths, tokens=self.tokens, packed=self.packed, window=window)
