"""Logits of a causal model at chosen positions only."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn


def logits_at(
    model: nn.Module, head: nn.Module, at: Int64[Tensor, " position"], **inputs: Any
) -> Float[Tensor, "position vocab"]:
    """Run a causal model, and its head at the positions `at` alone; `at` counts through batch × time.

    The hidden states are gathered before `head` (the output embedding) multiplies them, so that logits of
    prompts and padding are never made. What a model does to its logits after the head (a scale, a cap) is
    kept: it is done to each logit by itself. `inputs` are the model's own.
    """

    def take(_head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = arguments[0].flatten(0, 1)  # of a model in parts, perhaps on another device than the batch
        return (hidden.index_select(0, at.to(hidden.device)).unsqueeze(0), *arguments[1:])

    with head.register_forward_pre_hook(take):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.squeeze(0)
