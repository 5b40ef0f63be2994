"""The signal of a teacher that is a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cdm_toolkit.forward import device_of, logits_at
from cdm_toolkit.kd.batch import AlignedTeacherBatch
from cdm_toolkit.kd.sparse_logprobs import log_sum_exp, mean_logits, top_k, values_at
from cdm_toolkit.kd.types import SignalRequest, TeacherSignal


@torch.no_grad()
def teacher_signal(
    model: nn.Module, side: AlignedTeacherBatch, request: SignalRequest, *, vocab: int
) -> TeacherSignal:
    """Run a teacher over its side of a batch; of its logits the first `vocab` belong to ids of its tokenizer.

    Only the logits that the request needs are made; they are reduced to top-k log-probabilities at once. A model
    in training mode is in evaluation mode for the call. One on another device gets what it reads there, and the signal
    comes back to the batch's.
    """
    signal = _signal(model, side.to_teacher(device_of(model)), request, vocab)
    return signal.to(side.next_ids.device)


def _signal(model: nn.Module, side: AlignedTeacherBatch, request: SignalRequest, vocab: int) -> TeacherSignal:
    head = model.get_output_embeddings()  # type: ignore[operator]
    with _evaluating(model):
        logits = logits_at(model, head, _positions(side, request), **side.inputs)
    return _reduced(logits, side, request, vocab)


@torch.no_grad()
def signal_of_logits(
    logits: Float[Tensor, "batch time_t columns"],
    side: AlignedTeacherBatch,
    request: SignalRequest,
    *,
    vocab: int,
) -> TeacherSignal:
    """Reduce whole logits of a teacher that has run already, as `teacher_signal` does."""
    positions = _positions(side, request)
    return _reduced(logits.flatten(0, 1).index_select(0, positions), side, request, vocab)


def _reduced(
    logits: Float[Tensor, "position columns"], side: AlignedTeacherBatch, request: SignalRequest, vocab: int
) -> TeacherSignal:
    if not request.token_logprobs and not request.mean_logits:
        return TeacherSignal(top_k(logits, request.top_k, real=vocab))
    group = side.token_group
    every = torch.arange(len(group), device=group.device)
    if request.mean_logits:
        top = top_k(mean_logits(logits, every, group, side.groups), request.top_k, real=vocab)
        if not request.token_logprobs:
            return TeacherSignal(top)
    lse = log_sum_exp(logits.narrow(1, 0, vocab))
    token_top = top_k(logits, request.top_k, real=vocab, lse=lse) if request.token_top else None
    if token_top is not None:
        top = token_top.at(side.group_first)
    elif not request.mean_logits:
        top = top_k(logits, request.top_k, real=vocab, rows=side.group_first, lse=lse)
    chosen = values_at(logits, every, side.next_ids).to(top.logprobs.dtype) - lse
    return TeacherSignal(top, chosen, group, side.next_ids, token_top)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _positions(side: AlignedTeacherBatch, request: SignalRequest) -> Int64[Tensor, " position"]:
    whole = request.token_logprobs or request.mean_logits
    return side.token_positions if whole else side.group_positions
