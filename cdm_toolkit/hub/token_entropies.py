"""Entropies of a model's next-token distributions along a text, used as token weights in DTW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Float64, Int32
from torch import Tensor

from cdm_toolkit.forward import logits_by_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdm_toolkit.tokdiff.spans import TokenSpans

POSITIONS_AT_ONCE = 64  # positions whose float32 distributions exist at one time


def token_entropies(model: PreTrainedModel, spans: TokenSpans) -> Float64[np.ndarray, " time"]:
    """Return the entropy, in nats, of the model's next-token distribution at each token (arXiv 2502.11104)."""
    (found,) = batch_entropies(model, [spans.ids], vocab=spans.view.vocab_size)
    return found


def batch_entropies(
    model: PreTrainedModel, sequences: Sequence[Int32[np.ndarray, " _"]], *, vocab: int
) -> list[Float64[np.ndarray, " _"]]:
    """Return, for each token of several sequences, the entropy in nats of the next-token distribution after it.

    Logits from index `vocab` on are padding, and excluded from the distribution.
    """
    found: list[Float64[np.ndarray, " _"]] = [np.zeros(0) for _ in sequences]
    for batch in logits_by_batch(model, sequences):
        for row, logits in batch.by_row():
            found[row] = _entropies(logits[:, :vocab])
    return found


def _entropies(logits: Float[Tensor, "time vocab"]) -> Float64[np.ndarray, " time"]:
    parts = [
        torch.distributions.Categorical(logits=part.float()).entropy()
        for part in logits.split(POSITIONS_AT_ONCE)
    ]
    entropies: Float64[np.ndarray, " time"] = torch.cat(parts).double().cpu().numpy()
    return entropies
