"""Labels and all teachers in one pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cdm_toolkit.distill.losses import pick
from cdm_toolkit.distill.losses.combine import loss_parts
from cdm_toolkit.distill.losses.pick import mean_logits
from cdm_toolkit.distill.losses.record import KdParts, LossParts, objective

from .cases import draw


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Note the shape of each gradient tensor that a pick writes."""
    shapes: list[tuple[int, ...]] = []
    original = pick._LogProbs.backward

    def noted(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        found = original(ctx, gradient)
        shapes.append(tuple(found[0].shape))
        return found

    monkeypatch.setattr(pick._LogProbs, "backward", staticmethod(noted))
    return shapes


def test_without_a_reader_it_is_cross_entropy() -> None:
    case = draw("em", 0)
    parts = loss_parts(case.logits, case.labels)
    expected = torch.nn.functional.cross_entropy(case.logits, case.labels, reduction="sum")
    assert parts.ce.item() == pytest.approx(expected.item())
    assert parts.kd == ()


def test_labels_and_teachers_share_one_gradient_tensor(backward_calls: list[tuple[int, ...]]) -> None:
    case = draw("em", 1)
    logits = case.logits.clone().requires_grad_()
    readers = [case.reader(name) for name in ("em", "gold")]
    parts = loss_parts(logits, case.labels, readers)
    objective(parts, alpha=0.5, weights=[1, 2], tokens=6, positions=[4, 4]).backward()
    assert backward_calls == [logits.shape]


def test_means_are_a_source_of_their_own(backward_calls: list[tuple[int, ...]]) -> None:
    """Reading the mean of a group's rows is reading a row of means."""
    case = draw("em", 2)
    reader = case.reader("em")
    logits = case.logits.clone().requires_grad_()
    of_means = replace(reader, student_rows=case.rows, student_group=case.group_s)
    parts = loss_parts(logits, case.labels, [reader, of_means])
    means = mean_logits(case.logits, case.rows, case.group_s, case.groups)
    counts = torch.bincount(case.group_s)
    for group in range(case.groups):
        rows = case.rows[case.group_s == group]
        assert torch.allclose(means[group], case.logits[rows].sum(0) / counts[group])
    every = torch.arange(case.groups)
    alone = loss_parts(
        means, torch.zeros(case.groups, dtype=torch.long), [replace(reader, student_rows=every)]
    )
    assert parts.kd[1].kd.item() == pytest.approx(alone.kd[0].kd.item(), abs=1e-12)
    assert parts.kd[0].kd.item() != pytest.approx(parts.kd[1].kd.item())
    parts.kd[0].kd.backward(retain_graph=True)
    parts.kd[1].kd.backward()
    assert sorted(backward_calls) == sorted([logits.shape, means.shape])


def test_each_teacher_counts_as_it_would_alone() -> None:
    """A teacher that has no group here keeps its place."""
    case = draw("cdm", 3)
    names = ("cdm", "uld", "alm")
    readers = [case.reader(name) for name in names]
    together = loss_parts(case.logits, case.labels, [readers[0], None, *readers[1:]])
    alone = [loss_parts(case.logits, case.labels, [reader]).kd[0] for reader in readers]
    assert [kd.kd.item() for kd in together.kd] == pytest.approx(
        [alone[0].kd.item(), 0, alone[1].kd.item(), alone[2].kd.item()], abs=1e-12
    )
    assert (together.kd[1].matched_mass.item(), together.kd[1].pairs.item()) == (0, 0)


def test_whole_tokens_are_not_read_from_means() -> None:
    case = draw("alm", 4)
    with pytest.raises(ValueError, match="not means"):
        replace(case.reader("alm"), student_rows=case.rows, student_group=case.group_s)


def test_objective() -> None:
    ce, first, second = (torch.tensor(value) for value in (6.0, 8.0, 3.0))
    nothing = torch.tensor(0.0)
    parts = LossParts(ce, (KdParts(first, nothing, nothing), KdParts(second, nothing, nothing)), ce[None])
    found = objective(parts, alpha=0.25, weights=[1.0, 2.0], tokens=3, positions=[4, torch.tensor(6)])
    assert math.isclose(found.item(), 0.25 * 2 + 0.75 * (1 * 2 + 2 * 0.5))
    none = LossParts(nothing, (KdParts(nothing, nothing, nothing),), nothing[None])
    assert objective(none, alpha=0.5, weights=[1], tokens=0, positions=[0]).item() == 0
