"""What a causal model predicts after a text and each of many short continuations of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

KEPT = 8192
"""Tokens of continuations whose keys and values are kept; those that were read longest ago go first."""

Path = tuple[int, ...]


class ReadText:
    """A text that a model has read once: predictions after any part of it, and its keys and values."""

    def __init__(self, model: nn.Module, ids: Sequence[int], *, vocab: int) -> None:
        """Run a causal model of transformers, in evaluation mode, whose cache is the keys and values of all positions.

        The first `vocab` columns of its logits belong to ids of its tokenizer; what it predicts is over these.
        """
        self.model, self.vocab = model, vocab
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([list(ids)], device=_device(model)), use_cache=True)
        self.logprobs = _normalised(out.logits[0], vocab)
        self.new_cache: Any = type(out.past_key_values)
        self.state = _state(out.past_key_values)[:, :, 0]

    def after(self, length: int) -> Continuations:
        """Give the predictions after the first `length` tokens, at least one, and after what may follow these."""
        return Continuations(self, length)


class Continuations:
    """The log-probabilities of the next token after each of several sequences of ids that follow one text."""

    def __init__(self, text: ReadText, length: int) -> None:
        """Go on after the first `length` tokens of a text."""
        self.text, self.length = text, length
        self._states: dict[Path, Float[Tensor, "layer two heads time width"]] = {}

    def __call__(self, paths: Sequence[Path]) -> Float[np.ndarray, "path vocab"]:
        """Run the model on all paths at once, each from the longest part of it whose state is known."""
        found = np.empty((len(paths), self.text.vocab), np.float32)
        for nth, path in enumerate(paths):
            if not path:
                found[nth] = self.text.logprobs[self.length - 1].numpy(force=True)
        longer = [nth for nth, path in enumerate(paths) if path]
        if longer:
            found[longer] = self._run([tuple(paths[nth]) for nth in longer])
        return found

    @torch.inference_mode()
    def _run(self, paths: Sequence[Path]) -> Float[np.ndarray, "path vocab"]:
        text = self.text.state[..., : self.length, :]
        known = [self._known(path) for path in paths]
        new = [len(path) - size for path, size in zip(paths, known, strict=True)]
        before = self.length + max(known)
        past = text.new_zeros(*text.shape[:2], len(paths), text.shape[2], before, text.shape[4])
        past[..., : self.length, :] = text.unsqueeze(2)
        mask = torch.ones(len(paths), before + max(new), dtype=torch.long)
        ids = torch.zeros(len(paths), max(new), dtype=torch.long)
        for row, (path, size) in enumerate(zip(paths, known, strict=True)):
            mask[row, self.length : before - size] = 0
            mask[row, before + new[row] :] = 0
            ids[row, : new[row]] = torch.tensor(path[size:])
            if size:
                past[:, :, row, :, before - size :] = self._states[path[:size]]
        positions = self.length + torch.tensor(known)[:, None] + torch.arange(max(new))
        out = self.text.model(
            input_ids=ids.to(past.device),
            attention_mask=mask.to(past.device),
            position_ids=positions.to(past.device),
            past_key_values=self.text.new_cache([(keys, values) for keys, values in past]),
            use_cache=True,
        )
        self._keep(paths, known, _state(out.past_key_values, before - max(known)))
        last = torch.tensor(new, device=past.device) - 1
        logits = out.logits[torch.arange(len(paths), device=past.device), last]
        return _normalised(logits, self.text.vocab).numpy(force=True)

    def _known(self, path: Path) -> int:
        """Count the tokens of the path whose state is known; the last one is always read again."""
        return next((size for size in range(len(path) - 1, 0, -1) if path[:size] in self._states), 0)

    def _keep(self, paths: Sequence[Path], known: Sequence[int], states: Tensor) -> None:
        for row, (path, size) in enumerate(zip(paths, known, strict=True)):
            begin = max(known) - size
            own = states[:, :, row, :, begin : begin + len(path)]
            self._states.pop(path, None)
            self._states[path] = own.clone()
        while len(self._states) > len(paths) and sum(map(len, self._states)) > KEPT:
            self._states.pop(next(iter(self._states)))


def _state(cache: Any, begin: int = 0) -> Float[Tensor, "layer two batch heads time width"]:
    """Take the keys and values of all positions from `begin` on."""
    return torch.stack(
        [torch.stack([side[..., begin:, :] for side in (each.keys, each.values)]) for each in cache.layers]
    )


def _normalised(logits: Float[Tensor, "row columns"], vocab: int) -> Float[Tensor, "row vocab"]:
    return logits[:, :vocab].float().log_softmax(-1)


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device
