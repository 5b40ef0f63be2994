"""What the student writes after prompts: `generate`, in batches, reproducible."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from transformers import GenerationConfig

from cdm_toolkit.batching import batches, padded
from cdm_toolkit.forward import as_it_was
from cdm_toolkit.kd.tokenized_rows import END_ROLES

if TYPE_CHECKING:
    from cdm_toolkit.distill.settings import OnPolicyConfig
    from cdm_toolkit.kd.rows import Row
    from cdm_toolkit.kd.tokenized_rows import TokenizerSide


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the student reads before it writes the completion of a row."""

    row: Row
    ids: Int32[np.ndarray, " prompt"]


class NotFiniteLogits(Exception):
    """The student's logits are not finite: nothing can be sampled from them."""


SAMPLED_AT_ONCE = 2**15
"""Tokens of the texts that are sampled together, at most: their keys and values lie in memory."""


def ends_of(side: TokenizerSide, model: Any) -> list[int]:
    """List the ids at which a sample ends: special tokens that end texts or turns, and those that the model names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {side.eos}
    ends |= {token for token, special in side.view.special.items() if special.roles & END_ROLES}
    return sorted(token for token in ends if token is not None)


def sample_ids(
    model: Any,
    prompts: Sequence[Prompt],
    settings: OnPolicyConfig,
    side: TokenizerSide,
    max_length: int,
    seed: int,
) -> list[list[int]]:
    """Continue prompts with a model in evaluation mode, those of like length together, padded on the left.

    The ids go up to the one that ends a sample, to `max_new_tokens`, or to `max_length` with the prompt. Random numbers
    begin at `seed`, and go on afterwards as if none had been taken. NotFiniteLogits.
    """
    device = next(model.parameters()).device
    ends = ends_of(side, model)
    new = [room_after(prompt, settings, max_length) for prompt in prompts]
    lengths = [len(prompt.ids) + count for prompt, count in zip(prompts, new, strict=True)]
    sampled: list[list[int]] = [[] for _ in prompts]
    with as_it_was(model, device), _without_defaults(model):
        torch.manual_seed(seed)
        for batch in _together(model, lengths, new):
            ids, mask, _ = padded([prompts[nth].ids for nth in batch], ends[0] if ends else 0, "left")
            rows = generate_rows(
                model,
                torch.from_numpy(ids).to(device),
                torch.from_numpy(mask).to(device),
                max_new_tokens=max(new[nth] for nth in batch),
                ends=ends,
                temperature=settings.temperature,
                top_p=settings.top_p,
            )
            for nth, row in zip(batch, rows, strict=True):
                sampled[nth] = row[: min(up_to_end(row, ends), new[nth])]
    return sampled


def up_to_end(ids: Sequence[int], ends: Sequence[int]) -> int:
    """Count the ids up to the first that ends a sample, that one among them; all where none does.

    >>> up_to_end([5, 2, 7], ends=[2]), up_to_end([5, 7], ends=[2])
    (2, 2)
    """
    return next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))


def room_after(prompt: Prompt, settings: OnPolicyConfig, max_length: int) -> int:
    """Give the most tokens that a sample after a prompt has."""
    return min(settings.max_new_tokens, max_length - len(prompt.ids))


def _together(model: Any, lengths: Sequence[int], new: Sequence[int]) -> Iterator[list[int]]:
    """Batch texts whose lengths are given, and how many tokens of each are new, those of like length together.

    All rows of a batch go on as far as any: where that is beyond the model's positions, all have equally many.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max((length - count for length, count in zip(lengths, new, strict=True)), default=0) + max(
        new, default=0
    )
    apart = positions is not None and longest > positions
    for count in sorted(set(new)) if apart else [None]:
        some = [nth for nth in range(len(new)) if count is None or new[nth] == count]
        for batch in batches([lengths[nth] for nth in some], tokens=SAMPLED_AT_ONCE):
            yield [some[nth] for nth in batch]


def generate_rows(
    model: Any,
    ids: Int64[Tensor, "batch time"],
    mask: Int64[Tensor, "batch time"],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    temperature: float,
    top_p: float,
) -> list[list[int]]:
    """Let `generate` continue rows."""
    finite = _Finite(ids.device)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    unset = {"do_sample": False, "temperature": None, "top_p": None, "top_k": 0 if drawn else None}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        logits_processor=[finite],
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
        **unset | drawn,
    )
    if not finite.all:
        raise NotFiniteLogits
    rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return rows


class _Finite:
    """Sees whether all logits are finite, without waiting for the device, where sampling from others is the end."""

    def __init__(self, device: torch.device) -> None:
        self._all = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, ids: Tensor, scores: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        finite = scores.sum().isfinite()  # one pass: what is not finite stays so in a sum
        self._all &= finite
        return torch.where(finite, scores, 0.0)

    @property
    def all(self) -> bool:
        return bool(self._all)


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Leave out what a model's checkpoint says of sampling."""
    under_adapters = [model.get_base_model()] if hasattr(model, "get_base_model") else []
    models = [model, *under_adapters]
    settings = [each.generation_config for each in models]
    for each in models:
        each.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for each, its in zip(models, settings, strict=True):
            each.generation_config = its


def seed_of(seed: int, step: int, process: int) -> int:
    """Make the seed of the samples that a process draws at a step.

    >>> seed_of(0, 1, 0) == seed_of(0, 1, 0) != seed_of(0, 1, 1)
    True
    """
    digest = hashlib.sha256(f"{seed} {step} {process}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
