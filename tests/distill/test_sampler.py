"""The order of an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.distill.sampler import LengthGroupedSampler, TokenBatchSampler, epoch_order


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=700),
    st.integers(1, 9),
    st.integers(0, 3),
    st.booleans(),
)
def test_each_row_comes_once(
    lengths: list[int], rows_per_step: int, epoch: int, group_by_length: bool
) -> None:
    order = epoch_order(
        np.array(lengths), rows_per_step=rows_per_step, seed=1, epoch=epoch, group_by_length=group_by_length
    )
    assert sorted(order.tolist()) == list(range(len(lengths)))


@given(st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]), min_size=1, max_size=60), st.integers(0, 5))
def test_weights_are_how_often_a_row_comes(weights: list[float], epoch: int) -> None:
    given = np.array(weights)
    sampler = LengthGroupedSampler(
        np.arange(len(weights)),
        rows_per_step=4,
        seed=3,
        group_by_length=True,
        epoch=lambda: epoch,
        weights=given,
    )
    counts = np.bincount(list(sampler), minlength=len(weights))
    assert counts.sum() == len(sampler)
    assert (np.abs(counts - given) < 1).all()
    for weight in np.unique(given):
        assert (
            counts[given == weight].sum()
            == round(weight % 1 * (given == weight).sum()) + int(weight) * (given == weight).sum()
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batches_per_step", [1, 3])
def test_batches_of_tokens(packed: bool, batches_per_step: int) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 60, 700)
    at = [0]
    sampler = TokenBatchSampler(
        lengths, tokens=400, packed=packed, batches_per_step=batches_per_step, seed=3, epoch=lambda: at[0]
    )
    epochs = []
    for epoch in range(4):
        at[0] = epoch
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert len(batches) % batches_per_step == 0
        assert sorted(row for batch in batches for row in batch) == list(range(700))
        cost = [lengths[b].sum() if packed else lengths[b].max() * len(b) for b in map(np.array, batches)]
        assert np.mean(cost) > 0.85 * 400
        assert np.mean(np.array(cost) > 400) < 0.03
        assert list(sampler) == batches
        epochs.append(batches)
    assert epochs[0] != epochs[1]


def test_processes_share_batches_of_tokens() -> None:
    """As accelerate hands them out: equally many to each, and no row twice."""
    from accelerate.data_loader import BatchSamplerShard

    lengths = np.random.default_rng(1).integers(5, 60, 301)
    sampler = TokenBatchSampler(lengths, tokens=200, packed=True, batches_per_step=3, seed=0, epoch=lambda: 0)
    shards = [list(BatchSamplerShard(sampler, 3, process)) for process in range(3)]  # type: ignore[arg-type]
    assert len({len(shard) for shard in shards}) == 1
    assert sorted(row for shard in shards for batch in shard for row in batch) == list(range(301))


def test_weights_count_in_batches_of_tokens() -> None:
    weights = np.array([2.0, 0.5] * 50)
    sampler = TokenBatchSampler(
        np.full(100, 10),
        tokens=100,
        packed=True,
        batches_per_step=1,
        seed=0,
        epoch=lambda: 1,
        weights=weights,
    )
    counts = np.bincount([row for batch in sampler for row in batch], minlength=100)
    assert (counts[::2] == 2).all()
    assert counts[1::2].sum() == 25


def test_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.arange(100)
    make = {"rows_per_step": 4, "group_by_length": True}
    first = epoch_order(lengths, seed=0, epoch=0, **make)  # type: ignore[arg-type]
    assert np.array_equal(first, epoch_order(lengths, seed=0, epoch=0, **make))  # type: ignore[arg-type]
    assert not np.array_equal(first, epoch_order(lengths, seed=0, epoch=1, **make))  # type: ignore[arg-type]
    assert not np.array_equal(first, epoch_order(lengths, seed=1, epoch=0, **make))  # type: ignore[arg-type]


def test_rows_of_like_length_spare_padding() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 2000)

    def padded(group_by_length: bool) -> float:
        order = epoch_order(lengths, rows_per_step=8, seed=0, epoch=0, group_by_length=group_by_length)
        steps = lengths[order].reshape(-1, 8)
        return float(1 - steps.sum() / (steps.max(1) * 8).sum())

    assert padded(True) < 0.05 < 0.3 < padded(False)
    order = epoch_order(lengths, rows_per_step=8, seed=0, epoch=0, group_by_length=True)
    means = lengths[order].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2, (
        "steps of like length do not follow one another"
    )


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_rows_of_a_step_do_not_depend_on_its_batches(accumulation: int) -> None:
    epoch = 0
    order = LengthGroupedSampler(
        np.arange(64), rows_per_step=8, seed=0, group_by_length=True, epoch=lambda: epoch
    )
    batches = np.array(list(order)).reshape(-1, 8 // accumulation)
    steps = batches.reshape(-1, 8)
    whole = epoch_order(np.arange(64), rows_per_step=8, seed=0, epoch=0, group_by_length=True).reshape(-1, 8)
    assert np.array_equal(steps, whole)
    epoch = 1
    assert list(order) != whole.flatten().tolist()
