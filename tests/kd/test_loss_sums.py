"""Labels and all teachers in one pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cdm_toolkit.kd import sparse_logprobs
from cdm_toolkit.kd.loss_sums import loss_sums
from cdm_toolkit.kd.objective import weighted_loss
from cdm_toolkit.kd.sparse_logprobs import mean_logits
from cdm_toolkit.kd.types import KDSums, LossSums

from .cases import draw


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Note the shape of each gradient tensor that a request writes."""
    shapes: list[tuple[int, ...]] = []
    original = sparse_logprobs._SparseLogprobs.backward

    def noted(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        found = original(ctx, gradient)
        shapes.append(tuple(found[0].shape))
        return found

    monkeypatch.setattr(sparse_logprobs._SparseLogprobs, "backward", staticmethod(noted))
    return shapes


def test_without_a_teacher_it_is_cross_entropy() -> None:
    case = draw("exact", 0)
    sums = loss_sums(case.logits, case.labels)
    expected = torch.nn.functional.cross_entropy(case.logits, case.labels, reduction="sum")
    assert sums.ce.item() == pytest.approx(expected.item())
    assert sums.kd == ()


def test_labels_and_teachers_share_one_gradient_tensor(backward_calls: list[tuple[int, ...]]) -> None:
    case = draw("exact", 1)
    logits = case.logits.clone().requires_grad_()
    inputs = [case.inputs(name) for name in ("exact", "gold")]
    sums = loss_sums(logits, case.labels, inputs)
    weighted_loss(sums, alpha=0.5, weights=[1, 2], labels=6, groups=[4, 4]).backward()
    assert backward_calls == [logits.shape]


def test_means_are_a_source_of_their_own(backward_calls: list[tuple[int, ...]]) -> None:
    """Reading the mean of a group's rows is reading a row of means."""
    case = draw("exact", 2)
    inputs = case.inputs("exact")
    logits = case.logits.clone().requires_grad_()
    of_means = replace(inputs, student_rows=case.rows, student_group=case.group_s)
    sums = loss_sums(logits, case.labels, [inputs, of_means])
    means = mean_logits(case.logits, case.rows, case.group_s, case.groups)
    counts = torch.bincount(case.group_s)
    for group in range(case.groups):
        rows = case.rows[case.group_s == group]
        assert torch.allclose(means[group], case.logits[rows].sum(0) / counts[group])
    every = torch.arange(case.groups)
    alone = loss_sums(
        means, torch.zeros(case.groups, dtype=torch.long), [replace(inputs, student_rows=every)]
    )
    assert sums.kd[1].kd.item() == pytest.approx(alone.kd[0].kd.item(), abs=1e-12)
    assert sums.kd[0].kd.item() != pytest.approx(sums.kd[1].kd.item())
    sums.kd[0].kd.backward(retain_graph=True)
    sums.kd[1].kd.backward()
    assert sorted(backward_calls) == sorted([logits.shape, means.shape])


def test_each_teacher_counts_as_it_would_alone() -> None:
    """A teacher that has no group here keeps its place."""
    case = draw("spelling", 3)
    names = ("spelling", "uld", "alm")
    inputs = [case.inputs(name) for name in names]
    together = loss_sums(case.logits, case.labels, [inputs[0], None, *inputs[1:]])
    alone = [loss_sums(case.logits, case.labels, [one]).kd[0] for one in inputs]
    assert [kd.kd.item() for kd in together.kd] == pytest.approx(
        [alone[0].kd.item(), 0, alone[1].kd.item(), alone[2].kd.item()], abs=1e-12
    )
    assert (together.kd[1].matched_mass.item(), together.kd[1].pairs.item()) == (0, 0)


def test_whole_tokens_are_not_read_from_means() -> None:
    case = draw("alm", 4)
    with pytest.raises(ValueError, match="not means"):
        replace(case.inputs("alm"), student_rows=case.rows, student_group=case.group_s)


def test_weighted_loss() -> None:
    ce, first, second = (torch.tensor(value) for value in (6.0, 8.0, 3.0))
    nothing = torch.tensor(0.0)
    sums = LossSums(ce, (KDSums(first, nothing, nothing), KDSums(second, nothing, nothing)), ce[None])
    found = weighted_loss(sums, alpha=0.25, weights=[1.0, 2.0], labels=3, groups=[4, torch.tensor(6)])
    assert math.isclose(found.item(), 0.25 * 2 + 0.75 * (1 * 2 + 2 * 0.5))
    none = LossSums(nothing, (KDSums(nothing, nothing, nothing),), nothing[None])
    assert weighted_loss(none, alpha=0.5, weights=[1], labels=0, groups=[0]).item() == 0
