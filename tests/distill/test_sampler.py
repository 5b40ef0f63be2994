"""The order of an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from cdm_toolkit.distill.order import EpochOrder, epoch_order
from hypothesis import given
from hypothesis import strategies as st


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=700),
    st.integers(1, 9),
    st.integers(0, 3),
    st.booleans(),
)
def test_each_row_comes_once(lengths: list[int], rows_a_step: int, epoch: int, bucket: bool) -> None:
    order = epoch_order(np.array(lengths), rows_a_step=rows_a_step, seed=1, epoch=epoch, bucket=bucket)
    assert sorted(order.tolist()) == list(range(len(lengths)))


def test_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.arange(100)
    make = {"rows_a_step": 4, "bucket": True}
    first = epoch_order(lengths, seed=0, epoch=0, **make)  # type: ignore[arg-type]
    assert np.array_equal(first, epoch_order(lengths, seed=0, epoch=0, **make))  # type: ignore[arg-type]
    assert not np.array_equal(first, epoch_order(lengths, seed=0, epoch=1, **make))  # type: ignore[arg-type]
    assert not np.array_equal(first, epoch_order(lengths, seed=1, epoch=0, **make))  # type: ignore[arg-type]


def test_buckets_spare_padding() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 2000)

    def padded(bucket: bool) -> float:
        order = epoch_order(lengths, rows_a_step=8, seed=0, epoch=0, bucket=bucket)
        steps = lengths[order].reshape(-1, 8)
        return float(1 - steps.sum() / (steps.max(1) * 8).sum())

    assert padded(True) < 0.05 < 0.3 < padded(False)
    order = epoch_order(lengths, rows_a_step=8, seed=0, epoch=0, bucket=True)
    means = lengths[order].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2, (
        "steps of like length do not follow one another"
    )


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_rows_of_a_step_do_not_depend_on_its_batches(accumulation: int) -> None:
    epoch = 0
    order = EpochOrder(np.arange(64), rows_a_step=8, seed=0, bucket=True, epoch=lambda: epoch)
    batches = np.array(list(order)).reshape(-1, 8 // accumulation)
    steps = batches.reshape(-1, 8)
    whole = epoch_order(np.arange(64), rows_a_step=8, seed=0, epoch=0, bucket=True).reshape(-1, 8)
    assert np.array_equal(steps, whole)
    epoch = 1
    assert list(order) != whole.flatten().tolist()
