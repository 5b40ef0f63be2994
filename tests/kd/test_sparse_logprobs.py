"""Log-probabilities of a few ids, against float64 NumPy and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cdm_toolkit.kd import sparse_logprobs as module
from cdm_toolkit.kd.sparse_logprobs import log_sum_exp, sparse_logprobs, top_k


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


ROWS = torch.tensor([0, 0, 3, 6, 6, 6])
IDS = torch.tensor([1, 10, 4, 0, 0, 9])  # a pick may come twice: it then has twice the gradient


def log_softmax_twin(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_equals_twin(logits: torch.Tensor) -> None:
    picked = sparse_logprobs(logits, log_sum_exp(logits), ROWS, IDS)
    assert np.allclose(picked, log_softmax_twin(logits.numpy())[ROWS, IDS], atol=1e-14)


def test_gradient_is_that_of_finite_differences(logits: torch.Tensor) -> None:
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sparse_logprobs(z, log_sum_exp(z.detach()), ROWS, IDS), logits)


def test_chunks_change_nothing(logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = z.clone().requires_grad_()
        sparse_logprobs(z, log_sum_exp(z.detach()), ROWS, IDS).pow(2).sum().backward()
        best = top_k(z.detach(), 4, real=9, rows=ROWS)
        return z.grad, best.ids, best.logprobs  # type: ignore[return-value]

    whole = all_of(logits)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2 * 11)
    assert all(torch.equal(a, b) for a, b in zip(whole, all_of(logits), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(logits: torch.Tensor, dtype: torch.dtype) -> None:
    half = logits.to(dtype).requires_grad_()
    picked = sparse_logprobs(half, log_sum_exp(half.detach()), ROWS, IDS)
    assert picked.dtype == torch.float32
    expected = half.detach().float().log_softmax(-1)[ROWS, IDS]
    assert torch.allclose(picked, expected, atol=1e-6)
    picked.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype


def test_half_precision_keeps_the_gradient_of_a_confident_label() -> None:
    """1 - p is small, and the sum of two picks: p in bfloat16 would be 1, and the gradient 0."""
    half = torch.zeros(2, 8, dtype=torch.bfloat16)
    half[0, 3], half[1, 5] = 9.0, 10.0
    exact = half.double().requires_grad_()
    half.requires_grad_()
    rows, ids, weights = torch.tensor([0, 1, 1]), torch.tensor([3, 5, 5]), torch.tensor([1.0, 0.5, 0.25])
    (sparse_logprobs(half, log_sum_exp(half.detach()), rows, ids) * weights).sum().backward()
    (exact.log_softmax(-1)[rows, ids] * weights).sum().backward()
    assert half.grad is not None
    assert exact.grad is not None
    assert torch.allclose(half.grad.double(), exact.grad, rtol=2**-8, atol=0)


def test_no_rows() -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    sparse_logprobs(empty, log_sum_exp(empty.detach()), none, none).sum().backward()
    assert top_k(empty.detach(), 3, real=5).ids.shape == (0, 3)


def test_padded_ids_are_left_out_of_top_k_and_of_its_sum(logits: torch.Tensor) -> None:
    logits[:, 9:] = 100.0
    best = top_k(logits, 3, real=9)
    assert best.ids.max() < 9
    expected = log_softmax_twin(logits[:, :9].numpy())
    assert np.allclose(best.logprobs, np.sort(expected)[:, ::-1][:, :3])


def test_top_k_over_a_given_sum(logits: torch.Tensor) -> None:
    lse = log_sum_exp(logits)
    best = top_k(logits, 11, real=11, rows=ROWS, lse=lse)
    assert torch.allclose(best.logprobs, logits.log_softmax(-1)[ROWS].sort(descending=True).values)
