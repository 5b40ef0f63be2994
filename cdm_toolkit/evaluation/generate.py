"""One greedy answer, to be read by a person."""

from __future__ import annotations

from typing import Any

from cdm_toolkit.distill.rows import Row
from cdm_toolkit.evaluation.run import start_token


def generate(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 128) -> str:
    """Answer a prompt greedily, up to the end-of-sequence token or `max_new_tokens`.

    The model reads what it was trained on: the start token, the prompt, a line feed. The prompt is cut on the
    left where the model has too few positions for it and the answer.
    """
    import torch

    ids: list[int] = tokenizer(Row(1, prompt, "").text, add_special_tokens=False).input_ids
    start, pad = start_token(tokenizer), tokenizer.pad_token_id
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        ids = ids[-max(1, positions - max_new_tokens - 1) :]
    ids = ids if start is None else [start, *ids]
    prefix = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            prefix,
            attention_mask=torch.ones_like(prefix),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,  # transformers warns of a checkpoint's own sampling settings
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        )
    answer: str = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return answer.strip()
