"""Log-probabilities of a few ids out of a large vocabulary, without a second tensor of logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdm_toolkit.kd.types import TopK

CHUNK_ELEMENTS = 1 << 24
"""Logits that are upcast at a time: 64 MiB in float32."""
BLOCK = 8
"""Columns per block in the search for the k largest."""


def _chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Give the first row and the number of rows of each chunk."""
    step = max(1, CHUNK_ELEMENTS // max(width, 1))
    return ((first, min(step, rows - first)) for first in range(0, rows, step))


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def values_at(
    logits: Float[Tensor, "row vocab"], rows: Int64[Tensor, " pick"], ids: Int64[Tensor, " pick"]
) -> Float[Tensor, " pick"]:
    """Take logits[rows, ids]: with one flat index, as FakeTensorMode has no brackets for CUDA tensors."""
    return logits.reshape(-1).index_select(0, rows * logits.shape[1] + ids)


@torch.no_grad()
def log_sum_exp(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """Sum the exponentials of each row, in float32 or better, a chunk of rows at a time."""
    pieces = [_upcast(logits.narrow(0, *part)).logsumexp(-1) for part in _chunks(*logits.shape)]
    return torch.cat(pieces) if pieces else _upcast(logits.new_zeros(0))


@torch.no_grad()
def top_k(
    logits: Float[Tensor, "row vocab"],
    k: int,
    *,
    real: int,
    rows: Int64[Tensor, " group"] | None = None,
    lse: Float[Tensor, " row"] | None = None,
) -> TopK:
    """Take the `k` likeliest of the first `real` ids in `rows` of the logits.

    Columns from `real` on are embedding rows that no id has. Probabilities are over `lse` where it is given,
    else over the real ids alone.
    """
    ids, logprobs = [], []
    for part in _chunks(len(logits) if rows is None else len(rows), real):
        wanted = None if rows is None else rows.narrow(0, *part)
        chunk = logits.narrow(0, *part) if wanted is None else logits.index_select(0, wanted)
        chunk = chunk.narrow(1, 0, real)
        if lse is None:
            over = _upcast(chunk).logsumexp(-1)
        else:
            over = lse.narrow(0, *part) if wanted is None else lse.index_select(0, wanted)
        best, at = largest(chunk, k)
        ids.append(at)
        logprobs.append(_upcast(best) - over.unsqueeze(-1))
    if not ids:
        empty = logits.new_zeros(0, k)
        return TopK(empty.long(), _upcast(empty))
    return TopK(torch.cat(ids), torch.cat(logprobs))


def largest(values: Shaped[Tensor, "row column"], k: int) -> tuple[Tensor, Tensor]:
    """Give what `torch.topk` gives along the last dimension; of equal values perhaps others.

    No more than k blocks of columns can hold the k largest: those whose own largest are the largest. To find
    them first takes 0.6 of the time at k = 1,000 of 50,000 columns, and no more at k = 100.
    """
    rows, columns = values.shape
    blocks = columns // BLOCK
    if blocks < 2 * k:
        return values.topk(k, dim=-1)
    in_blocks = values.narrow(1, 0, blocks * BLOCK).unflatten(1, (blocks, BLOCK))
    chosen = in_blocks.amax(-1).topk(k, dim=-1, sorted=False).indices
    inside = (chosen.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    left_over = torch.arange(blocks * BLOCK, columns, device=values.device).expand(rows, -1)
    candidates = torch.cat((inside, left_over), -1)
    best, at = values.gather(-1, candidates).topk(k, dim=-1)
    return best, candidates.gather(-1, at)


def mean_logits(
    logits: Float[Tensor, "row vocab"],
    rows: Int64[Tensor, " member"],
    group: Int64[Tensor, " member"],
    groups: int,
) -> Float[Tensor, "group vocab"]:
    """Average the `rows` of each group: the logits of tokens that are aligned together (arXiv 2502.11104)."""
    ones = torch.ones_like(group, dtype=torch.promote_types(logits.dtype, torch.float32))
    counts = ones.new_zeros(groups).index_add(0, group, ones)
    weights = (1 / counts).index_select(0, group).to(logits.dtype).unsqueeze(-1)
    return logits.new_zeros(groups, logits.shape[1]).index_add(
        0, group, logits.index_select(0, rows) * weights
    )


class _SparseLogprobs(torch.autograd.Function):
    """log softmax(logits)[rows, ids]: the gradient is written once, into one tensor of the logits' shape."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, lse: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, lse, rows, ids)
        return _upcast(values_at(logits, rows, ids)) - lse.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, lse, rows, ids = ctx.saved_tensors
        taken = torch.zeros_like(lse).index_put_((rows,), gradient, accumulate=True)
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for part in _chunks(*logits.shape):
            softmax = (_upcast(logits.narrow(0, *part)) - lse.narrow(0, *part).unsqueeze(-1)).exp_()
            torch.mul(softmax, -taken.narrow(0, *part).unsqueeze(-1), out=result.narrow(0, *part))
        result.view(-1).index_copy_(0, *_picked_gradient(logits, lse, rows, ids, gradient, taken))
        return result, None, None, None


def _picked_gradient(
    logits: Float[Tensor, "row vocab"],
    lse: Float[Tensor, " row"],
    rows: Int64[Tensor, " pick"],
    ids: Int64[Tensor, " pick"],
    gradient: Float[Tensor, " pick"],
    taken: Float[Tensor, " row"],
) -> tuple[Int64[Tensor, " pick"], Float[Tensor, " pick"]]:
    """Give the positions of the picks in the flat logits and the gradient there, rounded once.

    In half precision 1 - p is gone when p was rounded before it is taken off. A position that was picked more than
    once comes as often, each time with the gradient of all its picks.
    """
    flat, order = (rows * logits.shape[1] + ids).sort()
    nth = (flat.diff(prepend=flat.new_full((1,), -1)) != 0).cumsum(0) - 1
    sums = torch.zeros_like(gradient).index_add_(0, nth, gradient.index_select(0, order))
    row = rows.index_select(0, order)
    logprobs = _upcast(values_at(logits, row, ids.index_select(0, order))) - lse.index_select(0, row)
    picked = sums.index_select(0, nth) - logprobs.exp_() * taken.index_select(0, row)
    return flat, picked.to(logits.dtype)


def sparse_logprobs(
    logits: Float[Tensor, "row vocab"],
    lse: Float[Tensor, " row"],
    rows: Int64[Tensor, " pick"],
    ids: Int64[Tensor, " pick"],
) -> Float[Tensor, " pick"]:
    """Give log softmax(logits)[rows, ids], differentiable in the logits; `lse` is their `log_sum_exp`.

    The logits are saved for the backward pass as they are: no float32 copy, no softmax.
    """
    picked: Tensor = _SparseLogprobs.apply(logits, lse, rows, ids)  # type: ignore[no-untyped-call]
    return picked
