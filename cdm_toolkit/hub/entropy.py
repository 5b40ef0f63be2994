"""The entropies of a model's predictions along a text, which weigh its tokens in DTW."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int32
    from torch import Tensor
    from transformers import PreTrainedModel

    from cdm_toolkit.tokdiff.spans import TokenSpans

POSITIONS_AT_ONCE = 64  # positions whose float32 distributions exist at one time


def token_entropies(model: PreTrainedModel, spans: TokenSpans) -> Float64[np.ndarray, " time"]:
    """Give the entropy, in nats, of the model's next-token distribution at each token (arXiv 2502.11104)."""
    (found,) = batch_entropies(model, [spans.ids], vocab=spans.view.vocab_size)
    return found


def batch_entropies(
    model: PreTrainedModel,
    sequences: Sequence[Int32[np.ndarray, " time"]],
    *,
    vocab: int,
    batch_tokens: int = 2048,
) -> list[Float64[np.ndarray, " time"]]:
    """Give, for each token of several sequences, the entropy in nats of what the model predicts after it.

    Sequences of like length run together, padded on the right to at most `batch_tokens` in all (or one sequence).
    Rows of the embedding from `vocab` on are padding and no part of the distribution.
    """
    found: list[Float64[np.ndarray, " time"]] = [np.zeros(0) for _ in sequences]
    for batch in _batches([len(ids) for ids in sequences], batch_tokens):
        logits = _logits(model, [sequences[i] for i in batch])
        for row, i in zip(logits, batch, strict=True):
            found[i] = _entropies(row[: len(sequences[i]), :vocab])
    return found


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Divide sequences, longest first, so that padding is little; empty ones are in no batch."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (not lengths[i] or (len(batch) + 1) * lengths[batch[0]] > batch_tokens):
            yield batch
            batch = []
        if lengths[i]:
            batch.append(i)
    if batch:
        yield batch


def _logits(model: PreTrainedModel, sequences: Sequence[Int32[np.ndarray, " time"]]) -> Tensor:
    import torch

    lengths = np.array([len(ids) for ids in sequences])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(sequences)
    inputs = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
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
