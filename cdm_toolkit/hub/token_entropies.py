"""Entropies of a model's next-token distributions along a text, used as token weights in DTW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float64, Int32
from torch import Tensor

from cdm_toolkit.batching import batches, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdm_toolkit.tokdiff.spans import TokenSpans

POSITIONS_AT_ONCE = 64  # positions whose float32 distributions exist at one time


def token_entropies(model: PreTrainedModel, spans: TokenSpans) -> Float64[np.ndarray, " time"]:
    """Return the entropy, in nats, of the model's next-token distribution at each token (arXiv 2502.11104)."""
    (found,) = batch_entropies(model, [spans.ids], vocab=spans.view.vocab_size)
    return found


def batch_entropies(
    model: PreTrainedModel,
    sequences: Sequence[Int32[np.ndarray, " _"]],
    *,
    vocab: int,
    batch_tokens: int = 2048,
) -> list[Float64[np.ndarray, " _"]]:
    """Return, for each token of several sequences, the entropy in nats of the next-token distribution after it.

    Sequences of similar length are batched, padded on the right to at most `batch_tokens` in total (or one sequence).
    Logits from index `vocab` on are padding, and excluded from the distribution.
    """
    found: list[Float64[np.ndarray, " _"]] = [np.zeros(0) for _ in sequences]
    full = [i for i, ids in enumerate(sequences) if len(ids)]
    for batch in batches([len(sequences[i]) for i in full], tokens=batch_tokens):
        indices = [full[i] for i in batch]
        logits = _logits(model, [sequences[i] for i in indices])
        for row, i in zip(logits, indices, strict=True):
            found[i] = _entropies(row[: len(sequences[i]), :vocab])
    return found


def _logits(model: PreTrainedModel, sequences: Sequence[Int32[np.ndarray, " _"]]) -> Tensor:
    import torch

    ids, mask, _ = padded(sequences)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.inference_mode():
        logits: Tensor = model(
            **{name: torch.from_numpy(array).to(model.device) for name, array in inputs.items()},
            use_cache=False,
        ).logits
    return logits


def _entropies(logits: Float[Tensor, "time vocab"]) -> Float64[np.ndarray, " time"]:
    import torch

    parts = [
        torch.distributions.Categorical(logits=part.float()).entropy()
        for part in logits.split(POSITIONS_AT_ONCE)
    ]
    entropies: Float64[np.ndarray, " time"] = torch.cat(parts).double().cpu().numpy()
    return entropies
