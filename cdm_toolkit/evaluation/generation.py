"""Continue prompts, many at once; one greedy answer, to be read by a person."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdm_toolkit.batching import batches, padded
from cdm_toolkit.errors import BadOption, UnsupportedTokenizer
from cdm_toolkit.evaluation.evaluate import Subject, start_token
from cdm_toolkit.kd.rows import Row
from cdm_toolkit.tokdiff.view import TokenizerView

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int64
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Generator = Callable[[Sequence[str]], list[str]]
"""Give each prompt's completion: `generate_batch` with all but the prompts filled in, or a stand-in."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Hold how completions are made: greedily where the temperature is 0."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    """Share of the probability that the likeliest tokens, which are drawn from, have together."""
    stop: tuple[str, ...] = ()
    seed: int = 0


def generate_batch(
    subject: Subject, prompts: Sequence[str], settings: GenerationSettings, *, batch_size: int | None = None
) -> list[str]:
    """Continue prompts up to the end-of-sequence token, a stop string or `max_new_tokens`.

    A completion is cut before its first stop string, and has neither the prompt nor special tokens. A model
    reads at most `batch_size` prompts at once, chosen by their length where None. Each draw has a seed of its
    own, made of `settings.seed`, the prompt and how often it stood before in `prompts`: what is drawn does not
    depend on the batch. A prompt without room for the answer is cut on the left. Raises BadOption.
    """
    limit = room_for_prompt(subject, settings.max_new_tokens)
    encoded = [prompt_ids(subject.tokenizer, prompt, limit) for prompt in prompts]
    seeds = _seeds(settings.seed, prompts)
    completions = [""] * len(prompts)
    for batch in batches([len(ids) + settings.max_new_tokens for ids in encoded], batch_size):
        rows = _continued(
            subject.model,
            subject.tokenizer,
            [encoded[place] for place in batch],
            settings,
            [seeds[place] for place in batch],
            subject.view,
        )
        for place, ids in zip(batch, rows, strict=True):
            text = spelled(subject.view, ids).decode("utf-8", errors="replace")
            completions[place] = cut_at(text, settings.stop)
    return completions


def room_for_prompt(subject: Subject, max_new_tokens: int) -> int | None:
    """Count the tokens that a prompt may have beside the answer; None where the model sets no bound."""
    positions = getattr(subject.model.config, "max_position_embeddings", None)
    if positions is None:
        return None
    if positions <= max_new_tokens:
        raise BadOption(
            "max_new_tokens", max_new_tokens, f"less than the {positions} positions of {subject.name}"
        )
    return int(positions) - max_new_tokens


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, limit: int | None) -> list[int]:
    """Encode a prompt as in training: after the start token, which a chat template may have put there."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    start = start_token(tokenizer)
    if start is None or ids[:1] == [start]:
        return ids if limit is None else ids[-limit:]
    return [start, *(ids if limit is None else ids[len(ids) - min(len(ids), limit - 1) :])]


def as_chat(subject: Subject, prompt: str) -> str:
    """Put a prompt into the model's own chat template. Raises UnsupportedTokenizer where it has none."""
    if not getattr(subject.tokenizer, "chat_template", None):
        raise UnsupportedTokenizer(
            subject.name, "it has no chat template", "score it without `chat_template`"
        )
    chat = [{"role": "user", "content": prompt}]
    return str(subject.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Cut a text before the first of some strings.

    >>> cut_at("4.\\n\\nQuestion: 1", ("Question:", "\\n\\n"))
    '4.'
    """
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]


def spelled(view: TokenizerView, ids: Sequence[int]) -> bytes:
    """Join the bytes of ids, special tokens and embedding rows without a token left out."""
    return b"".join(
        view.literals[token_id]
        for token_id in ids
        if token_id < view.vocab_size and not view.is_special[token_id]
    )


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, *, max_new_tokens: int = 128
) -> str:
    """Answer a prompt greedily, up to the end-of-sequence token or `max_new_tokens`.

    The model reads what it was trained on: the start token, the prompt, a line feed. The prompt is cut on the
    left where the model has too few positions for it and the answer.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    limit = None if positions is None else max(2, positions - max_new_tokens)
    ids = prompt_ids(tokenizer, Row(1, prompt, "").text, limit)
    (row,) = _continued(model, tokenizer, [ids], GenerationSettings(max_new_tokens), [0], None)
    answer: str = tokenizer.decode(row, skip_special_tokens=True)
    return answer.strip()


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    seeds: Sequence[int],
    view: TokenizerView | None,
) -> list[list[int]]:
    """Continue encoded prompts, padded on the left, and give the new ids up to the end-of-sequence token."""
    import torch

    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    ids, mask, _ = (torch.from_numpy(array).to(model.device) for array in padded(prompts, pad, "left"))
    longest = ids.shape[1]
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=settings.max_new_tokens,
            logits_processor=[_Draw(settings, seeds)] if settings.temperature > 0 else [],
            stopping_criteria=[_Stop(settings.stop, view, longest)] if settings.stop and view else [],
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad,
            # A checkpoint's own settings do not apply: what is drawn is chosen by _Draw.
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
    return [_up_to_end(row, ends) for row in out[:, longest:].tolist()]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Collect the ids that end an answer: the checkpoint may name more than the tokenizer."""
    named = model.generation_config.eos_token_id
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return ends - {None}


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((place for place, token_id in enumerate(ids) if token_id in ends), len(ids))]


def _seeds(seed: int, prompts: Sequence[str]) -> list[int]:
    """Make a seed for each prompt, another one each time that it stands in the list."""
    met: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        key = f"{seed}\0{met[prompt]}\0{prompt}".encode()
        seeds.append(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
        met[prompt] += 1
    return seeds


class _Draw:
    """Draw a token in each row from a source of its own: the largest of the logits with Gumbel noise added."""

    def __init__(self, settings: GenerationSettings, seeds: Sequence[int]) -> None:
        import torch

        self._settings = settings
        self._sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(
        self, ids: Int64[torch.Tensor, "batch time"], scores: Float[torch.Tensor, "batch vocab"]
    ) -> Float[torch.Tensor, "batch vocab"]:
        import torch

        scores = _top_p(scores.float() / self._settings.temperature, self._settings.top_p)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=source) for source in self._sources])
        tiny = torch.finfo(torch.float32).tiny  # the logarithm of 0 would choose a token for ever
        noise = -torch.log(-torch.log(uniform.clamp(min=tiny, max=1 - 2**-24)))
        return scores + noise.to(scores.device)


def _top_p(scores: Float[torch.Tensor, "batch vocab"], top_p: float) -> Float[torch.Tensor, "batch vocab"]:
    """Keep the fewest likeliest tokens whose probability together reaches `top_p`."""
    if top_p >= 1:
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    chances = ordered.softmax(-1)
    ordered = ordered.masked_fill(chances.cumsum(-1) - chances >= top_p, float("-inf"))
    return scores.scatter(-1, order, ordered)


class _Stop:
    """Say which rows have written a stop string. It spans at most as many tokens as it has bytes."""

    def __init__(self, stop: Sequence[str], view: TokenizerView, begin: int) -> None:
        self._stop = [word.encode() for word in stop]
        self._tail = max(map(len, self._stop)) + 1
        self._view, self._begin = view, begin

    def __call__(
        self, ids: Int64[torch.Tensor, "batch time"], scores: object, **_: object
    ) -> Bool[torch.Tensor, " batch"]:
        import torch

        tails = ids[:, max(self._begin, ids.shape[1] - self._tail) :].tolist()
        texts = [spelled(self._view, tail) for tail in tails]
        return torch.tensor([any(word in text for word in self._stop) for text in texts], device=ids.device)
