"""Read texts with a model's transformer layers alone, without the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int32
from torch import Tensor

from cdm_toolkit.forward import states_by_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdm_toolkit.tokdiff.view import TokenizerView

MAX_TOKENS = 1024
"""Tokens of a text that are read, at most."""
ENOUGH_TOKENS = 4096
"""Tokens after which the mean of the last hidden states is known well enough."""


def token_sequences(
    model: PreTrainedModel, view: TokenizerView, texts: Sequence[str]
) -> list[Int32[np.ndarray, " _"]]:
    """Tokenize texts, each cut to what the model reads at once; texts without tokens are left out."""
    longest = min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS)
    return [ids for spans in view.encode_batch(texts) if len(ids := spans.ids[:longest])]


def mean_state(
    model: PreTrainedModel, sequences: Sequence[Int32[np.ndarray, " _"]]
) -> Float[Tensor, " hidden"]:
    """Return the mean of what the output head reads, in float32, over the first sequences that have enough tokens."""
    ends = np.cumsum([len(ids) for ids in sequences])
    first = sequences[: int(np.searchsorted(ends, ENOUGH_TOKENS)) + 1]
    total = sum(batch.values.float().sum(0) for batch in states_by_batch(model, first))
    assert not isinstance(total, int)
    return total / sum(map(len, first))
