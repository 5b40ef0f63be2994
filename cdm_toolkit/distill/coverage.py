"""How much of a teacher's probability each strategy of vocabulary mapping reaches, on real text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool

from cdm_toolkit.forward import logits_by_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdm_toolkit.tokdiff.view import TokenizerView

POSITIONS_AT_ONCE = 64  # positions whose float32 probabilities exist at one time


def mass_by_strategy(
    teacher: PreTrainedModel,
    view: TokenizerView,
    texts: Sequence[str],
    reachable: Mapping[str, Bool[np.ndarray, " vocab_t"]],
    *,
    on_text: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Average the teacher's probability on the ids that each strategy reaches, over all positions of the texts.

    `reachable` says for each strategy which teacher ids it has a match for. Rows of the embedding beyond the
    vocabulary are padding and no part of the distribution.
    """
    masks = torch.from_numpy(np.stack(list(reachable.values())).astype(np.float32)).to(teacher.device)
    sums, positions, done = torch.zeros(len(masks), dtype=torch.float64), 0, 0
    sequences = [spans.ids for spans in view.encode_batch(texts, add_special_tokens=True)]
    for batch in logits_by_batch(teacher, sequences):
        for part in batch.values[:, : masks.shape[1]].split(POSITIONS_AT_ONCE):
            sums += (part.float().softmax(-1) @ masks.T).sum(0).double().cpu()
        positions += len(batch.values)
        done += len(batch.rows)
        on_text(done)
    return dict(zip(reachable, (sums / max(positions, 1)).tolist(), strict=True))
