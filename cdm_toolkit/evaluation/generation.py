"""Text generation: batches of prompts for the suites, and a single greedy answer for `cdm generate`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from cdm_toolkit.batching import batches, padded
from cdm_toolkit.errors import BadOption, UnsupportedTokenizer
from cdm_toolkit.evaluation.evaluate import Subject, start_token
from cdm_toolkit.kd.rows import Row
from cdm_toolkit.tokdiff.view import TokenizerView

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int64
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Settings of generation; greedy if the temperature is 0."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    """Nucleus sampling: draw from the most probable tokens whose total probability reaches this."""
    stop: tuple[str, ...] = ()
    seed: int = 0


def generate_wanted(
    subject: Subject,
    prompts: Mapping[str, str],
    settings: GenerationSettings,
    wanted: Sequence[str],
    batch_size: int | None,
) -> Iterator[dict[str, str]]:
    """Continue the prompts whose keys are wanted, as `generate_batch` does; yield the completions of a batch by key.

    Batches are those of all prompts, so that a resumed run generates the same as an uninterrupted one.
    """
    keys, chosen = list(prompts), set(wanted)
    encoded = (prompt_ids(subject.tokenizer, prompt, None) for prompt in prompts.values())
    lengths = [len(ids) + settings.max_new_tokens for ids in encoded]
    for batch in batches(lengths, batch_size):
        together = [keys[index] for index in batch]
        if not chosen.isdisjoint(together):
            asked = [prompts[key] for key in together]
            texts = generate_batch(subject, asked, settings, batch_size=len(asked))
            yield {key: text for key, text in zip(together, texts, strict=True) if key in chosen}


def generate_batch(
    subject: Subject, prompts: Sequence[str], settings: GenerationSettings, *, batch_size: int | None = None
) -> list[str]:
    """Continue prompts up to the end-of-sequence token, a stop string or `max_new_tokens`, as `generate_ids` does.

    A completion ends before its first stop string, and contains neither the prompt nor special tokens.
    """
    rows = generate_ids(subject, prompts, settings, batch_size=batch_size)
    texts = (spelled(subject.view, ids).decode("utf-8", errors="replace") for ids in rows)
    return [cut_at(text, settings.stop) for text in texts]


def generate_ids(
    subject: Subject, prompts: Sequence[str], settings: GenerationSettings, *, batch_size: int | None = None
) -> list[list[int]]:
    """Continue prompts; return the new ids of each, without the end-of-sequence token.

    A row with a stop string ends soon after it. Batches have at most `batch_size` prompts; None chooses it by their
    length. Each completion has its own seed, made of `settings.seed`, the prompt and the number of its previous
    occurrences in `prompts`, so samples do not depend on the batch. A prompt that leaves no room for the answer is
    truncated on the left. Raises BadOption.
    """
    limit = room_for_prompt(subject, settings.max_new_tokens)
    encoded = [prompt_ids(subject.tokenizer, prompt, limit) for prompt in prompts]
    seeds = _seeds(settings.seed, prompts)
    completions: list[list[int]] = [[] for _ in prompts]
    for batch in batches([len(ids) + settings.max_new_tokens for ids in encoded], batch_size):
        rows = [encoded[index] for index in batch]
        drawn = _continued(subject, rows, settings, [seeds[index] for index in batch])
        for index, ids in zip(batch, drawn, strict=True):
            completions[index] = ids
    return completions


def room_for_prompt(subject: Subject, max_new_tokens: int) -> int | None:
    """Return the maximum length of a prompt in tokens; None if the model has no maximum length."""
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
    """Wrap a prompt in the model's chat template. Raises UnsupportedTokenizer where it has none."""
    if not getattr(subject.tokenizer, "chat_template", None):
        raise UnsupportedTokenizer(
            subject.name, "it has no chat template", "score it without `chat_template`"
        )
    chat = [{"role": "user", "content": prompt}]
    return str(subject.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Truncate a text before the first of some stop strings.

    >>> cut_at("4.\\n\\nQuestion: 1", ("Question:", "\\n\\n"))
    '4.'
    """
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]


def spelled(view: TokenizerView, ids: Sequence[int]) -> bytes:
    """Join the bytes of ids, without special tokens and ids outside the vocabulary (padding rows)."""
    return b"".join(
        view.literals[token_id]
        for token_id in ids
        if token_id < view.vocab_size and not view.is_special[token_id]
    )


def generate(subject: Subject, prompt: str, *, max_new_tokens: int = 128) -> str:
    """Answer a prompt greedily, as `generate_batch` does. The input is as in training: the prompt, then a line feed."""
    (answer,) = generate_batch(subject, [Row(1, prompt, "").text], GenerationSettings(max_new_tokens))
    return answer.strip()


def _continued(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Continue encoded prompts, padded on the left; return the new ids up to the end-of-sequence token."""
    import torch

    model, tokenizer = subject.model, subject.tokenizer
    ends = _ends(subject)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    ids, mask, _ = (torch.from_numpy(array).to(model.device) for array in padded(prompts, pad, "left"))
    longest = ids.shape[1]
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=settings.max_new_tokens,
            logits_processor=[_GumbelSampler(settings, seeds)] if settings.temperature > 0 else [],
            stopping_criteria=[_StopStrings(settings.stop, subject.view, longest)] if settings.stop else [],
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad,
            # Override the checkpoint's generation settings: sampling is done by _GumbelSampler.
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
    return [list(takewhile(lambda token_id: token_id not in ends, row)) for row in out[:, longest:].tolist()]


def _ends(subject: Subject) -> set[int]:
    """Collect the ids that end an answer: the checkpoint may name more than the tokenizer."""
    named = subject.model.generation_config.eos_token_id
    ends = set(named if isinstance(named, list) else [named]) | {subject.tokenizer.eos_token_id}
    return ends - {None}


def _seeds(seed: int, prompts: Sequence[str]) -> list[int]:
    """Make a seed for each prompt; repeated prompts get different seeds."""
    occurrences: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        key = f"{seed}\0{occurrences[prompt]}\0{prompt}".encode()
        seeds.append(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
        occurrences[prompt] += 1
    return seeds


class _GumbelSampler:
    """Sample with the Gumbel-max trick: add Gumbel noise to the logits, from a separate generator for each row."""

    def __init__(self, settings: GenerationSettings, seeds: Sequence[int]) -> None:
        import torch

        self._settings = settings
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(
        self, ids: Int64[torch.Tensor, "batch time"], scores: Float[torch.Tensor, "batch vocab"]
    ) -> Float[torch.Tensor, "batch vocab"]:
        import torch

        scores = _top_p(scores.float() / self._settings.temperature, self._settings.top_p)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=each) for each in self._generators])
        tiny = torch.finfo(torch.float32).tiny  # avoid log(0), which would make the noise infinite
        noise = -torch.log(-torch.log(uniform.clamp(min=tiny, max=1 - 2**-24)))
        return scores + noise.to(scores.device)


def _top_p(scores: Float[torch.Tensor, "batch vocab"], top_p: float) -> Float[torch.Tensor, "batch vocab"]:
    """Keep the fewest most probable tokens whose total probability reaches `top_p`."""
    if top_p >= 1:
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    ordered = ordered.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, float("-inf"))
    return scores.scatter(-1, order, ordered)


class _StopStrings:
    """Stop rows that contain a stop string, which has at most as many tokens as bytes."""

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
