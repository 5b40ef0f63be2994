"""How much of a teacher's probability each strategy of vocabulary mapping reaches, on real text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdm_toolkit.tokdiff.view import TokenizerView

POSITIONS_AT_ONCE = 64  # positions whose float32 probabilities exist at one time


@torch.no_grad()
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
    sums, positions = torch.zeros(len(masks), dtype=torch.float64), 0
    for number, text in enumerate(texts, 1):
        ids = torch.from_numpy(view.encode(text, add_special_tokens=True).ids).long()[None]
        if ids.numel() == 0:
            continue
        logits = teacher(input_ids=ids.to(teacher.device)).logits[0, :, : masks.shape[1]]
        for part in logits.split(POSITIONS_AT_ONCE):
            sums += (part.float().softmax(-1) @ masks.T).sum(0).double().cpu()
        positions += len(logits)
        on_text(number)
    return dict(zip(reachable, (sums / max(positions, 1)).tolist(), strict=True))
