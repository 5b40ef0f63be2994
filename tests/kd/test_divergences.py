"""KL over matched pairs and the rest, against a plain twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_toolkit.kd.divergences import bucket_divergence
from cdm_toolkit.kd.settings import Divergence

TEMPERATURES = st.floats(0.3, 4.0)
Twin = Callable[[Sequence[float], Sequence[float]], float]


def bucket_twin(
    teacher: np.ndarray, student: np.ndarray, mask: np.ndarray, temperature: float, rest: bool, twin: Twin
) -> float:
    """One position: sum up the rest, apply the temperature, renormalise, compare."""
    sides = []
    for logprobs in (teacher, student):
        masses = [math.exp(value) for value, has in zip(logprobs, mask, strict=True) if has]
        if rest:
            masses.append(max(1 - sum(masses), -math.expm1(-1e-6)))
        powers = [mass ** (1 / temperature) for mass in masses]
        sides.append([power / sum(powers) for power in powers])
    return temperature**2 * twin(*sides)


def kl_twin(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def jsd_twin(p: Sequence[float], q: Sequence[float]) -> float:
    mixture = [0.3 * a + 0.7 * b for a, b in zip(p, q, strict=True)]
    return 0.3 * kl_twin(p, mixture) + 0.7 * kl_twin(q, mixture)


TWINS = {"kl": kl_twin, "reverse-kl": lambda p, q: kl_twin(q, p), "jsd": jsd_twin}


@st.composite
def positions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw log-probabilities of 1 to 6 outcomes that leave a rest, for both sides, and a mask."""
    size = draw(st.integers(1, 6))
    sides = []
    for _ in range(2):
        weights = draw(st.lists(st.floats(0.01, 1), min_size=size + 1, max_size=size + 1))
        sides.append(torch.tensor(weights, dtype=torch.float64).div(sum(weights)).log()[:size])
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    return sides[0][None], sides[1][None], mask[None]


KINDS = st.sampled_from(sorted(TWINS))


@given(positions(), TEMPERATURES, st.booleans(), KINDS)
@settings(max_examples=200, deadline=None)
def test_equals_twin(
    drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor], temperature: float, rest: bool, kind: Divergence
) -> None:
    teacher, student, mask = drawn
    options = {"temperature": temperature, "rest_bucket": rest, "divergence": kind, "beta": 0.3}
    found = bucket_divergence(teacher, student, mask, **options)
    arrays = (teacher[0].numpy(), student[0].numpy(), mask[0].numpy())
    assert found.item() == pytest.approx(bucket_twin(*arrays, temperature, rest, TWINS[kind]), abs=1e-9)


@given(positions(), TEMPERATURES, st.booleans(), KINDS)
@settings(max_examples=100, deadline=None)
def test_is_a_divergence(
    drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor], temperature: float, rest: bool, kind: Divergence
) -> None:
    teacher, student, mask = drawn
    options = {"temperature": temperature, "rest_bucket": rest, "divergence": kind}
    assert bucket_divergence(teacher, teacher, mask, **options).item() == pytest.approx(0, abs=1e-12)
    assert bucket_divergence(teacher, student, mask, **options).item() >= -1e-12


@pytest.mark.parametrize("rest", [True, False])
def test_no_pair_gives_nothing(rest: bool) -> None:
    teacher, student = torch.tensor([[0.9, 0.05]]).log(), torch.tensor([[0.1, 0.2]]).log().requires_grad_()
    divergence = bucket_divergence(teacher, student, torch.zeros(1, 2, dtype=torch.bool), rest_bucket=rest)
    divergence.sum().backward()
    assert divergence.item() == 0
    assert torch.equal(student.grad, torch.zeros(1, 2))


def test_one_pair_needs_the_rest_to_teach() -> None:
    teacher, student = torch.tensor([[0.9]]).log(), torch.tensor([[0.1]]).log()
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert bucket_divergence(teacher, student, mask, rest_bucket=False).item() == 0
    expected = 0.9 * math.log(0.9 / 0.1) + 0.1 * math.log(0.1 / 0.9)
    assert bucket_divergence(teacher, student, mask, rest_bucket=True).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_certainty_is_finite() -> None:
    certain = torch.zeros(1, 1, requires_grad=True)  # probability 1: no rest
    mask = torch.ones(1, 1, dtype=torch.bool)
    for teacher in (torch.zeros(1, 1), torch.tensor([[0.5]]).log()):
        divergence = bucket_divergence(teacher, certain, mask, temperature=0.5).sum()
        (gradient,) = torch.autograd.grad(divergence, certain)
        assert torch.isfinite(divergence)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("kind", sorted(TWINS))
def test_gradient_is_that_of_finite_differences(rest: bool, kind: Divergence) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(4, 6, generator=generator, dtype=torch.float64).log_softmax(-1)[:, :5]
    student = torch.randn(4, 6, generator=generator, dtype=torch.float64).log_softmax(-1)[:, :5]
    mask = torch.rand(4, 5, generator=generator) < 0.7
    student = student.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q: bucket_divergence(
            teacher, q, mask, temperature=0.8, rest_bucket=rest, divergence=kind, beta=0.3
        ),
        student,
    )
