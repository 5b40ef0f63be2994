"""The entropies of a model's predictions along a text, which weigh its tokens in DTW."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float64
    from transformers import PreTrainedModel

    from cdm_toolkit.tokdiff.spans import TokenSpans

POSITIONS_AT_ONCE = 64  # positions whose float32 distributions exist at one time


def token_entropies(model: PreTrainedModel, spans: TokenSpans) -> Float64[np.ndarray, " time"]:
    """Give the entropy, in nats, of the model's next-token distribution at each token (arXiv 2502.11104).

    Rows of the embedding beyond the tokenizer's vocabulary are padding and no part of the distribution.
    """
    import torch

    if len(spans) == 0:
        return np.zeros(0)
    ids = torch.from_numpy(spans.ids).long()[None].to(model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, :, : spans.view.vocab_size]
        parts = [
            torch.distributions.Categorical(logits=part.float()).entropy()
            for part in logits.split(POSITIONS_AT_ONCE)
        ]
    return torch.cat(parts).double().cpu().numpy()
