"""Bits per byte: a likelihood of text that is comparable across tokenizers.

The negative log-likelihood of all tokens of a text, in bits, divided by its UTF-8 bytes. Exactly the tokens that have
bytes of the text are scored. Special tokens that a tokenizer adds are context at most, and the end of the text is not
scored.

The context of the first token is the beginning-of-sequence token where the tokenizer has one, else the
end-of-sequence token (as in lm-eval); without either, its cost is the uniform `log2(vocabulary)`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float64
from pydantic import Field

from cdm_toolkit.artifacts.settings import Settings
from cdm_toolkit.errors import BadOption, BadRow, CdmError, VocabularyTooSmall
from cdm_toolkit.evaluation.evaluate import Ask, Contents, Subject, fingerprint, refuse, start_token
from cdm_toolkit.evaluation.scores import Item, Score, Summary
from cdm_toolkit.evaluation.suite_data import find_data, read_passages
from cdm_toolkit.evaluation.suites import SuiteSpec
from cdm_toolkit.tokdiff.changes import changes
from cdm_toolkit.tokdiff.spans import TokenSpans

if TYPE_CHECKING:
    import torch

ROWS_AT_ONCE = 128  # positions whose float32 log-softmax exists at one time


@dataclass(frozen=True, slots=True)
class Passage:
    """A text to score. Its first `given` bytes are context and are not scored."""

    text: str
    given: int = 0

    @property
    def scored_bytes(self) -> int:
        return len(self.text.encode()) - self.given


@dataclass(frozen=True, slots=True)
class PassageBits:
    """The negative log-likelihood of one passage in bits, and how it was measured."""

    passage: int
    """Index in the list of passages."""
    bits: float
    changed_bytes: int
    """Bytes that the tokens do not have: normalised, dropped or unknown. Their cost is underestimated."""
    windows: int


def bits_per_byte(
    bits: Float64[np.ndarray, " passage"], scored_bytes: Float64[np.ndarray, " passage"]
) -> tuple[float, float | None]:
    """Return total bits / total bytes, with the standard error of the ratio (delta method; None for one passage)."""
    value, n = float(bits.sum() / scored_bytes.sum()), len(bits)
    if n < 2:
        return value, None
    residual = bits - value * scored_bytes
    return value, float(math.sqrt(n / (n - 1) * np.square(residual).sum()) / scored_bytes.sum())


@dataclass(frozen=True, slots=True)
class _Window:
    """One window of a passage: the model input `ids`; its outputs from position `first` on are scored."""

    passage: int
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    first: int

    @property
    def scored(self) -> range:
        return range(self.first, len(self.ids))


def passage_bits(
    subject: Subject,
    passages: Sequence[Passage],
    *,
    window: int = 1024,
    stride: int = 512,
    batch_size: int | None = None,
    only: Collection[int] | None = None,
) -> Iterator[PassageBits]:
    """Yield the negative log-likelihood of each passage under a causal language model, as soon as it is known.

    A text of more than `window` tokens (or more than the model has positions) is read in windows that move by
    `stride`: each token is scored once, with at least `window - stride` tokens of context. Up to float rounding, the
    result does not depend on `batch_size`, nor, for a text that fits into one window, on `window` and `stride`. A
    token across the boundary between the given and the scored part is scored in full: the denominator is the same for
    every tokenizer, and the value can only be too high.

    `only` are the indices of the passages to yield; their values are bit-identical to a run over all passages.
    Raises BadOption for a stride outside 1 to window, VocabularyTooSmall where the model has too few rows,
    CdmError where a likelihood is not finite.
    """
    from cdm_toolkit.forward import logits_by_batch

    model, view, start = subject.model, subject.view, start_token(subject.tokenizer)
    window = min(window, getattr(model.config, "max_position_embeddings", None) or window)
    if not 1 <= stride <= window:
        raise BadOption("stride", stride, f"1 to {window}, the tokens of a window")
    spans = view.encode_batch([passage.text for passage in passages])
    firsts = [first_scored(span, passage.given) for span, passage in zip(spans, passages, strict=True)]
    windows = [
        part
        for number, (span, first) in enumerate(zip(spans, firsts, strict=True))
        for part in _windows(number, span.ids.tolist(), first, start, window, stride)
    ]
    rows = model.get_input_embeddings().weight.shape[0]
    if (top := max((max(part.targets) for part in windows), default=0)) >= rows:
        raise VocabularyTooSmall(view.name, rows, max(view.vocab_size, top + 1))

    first_cost = 0.0 if start is not None else math.log2(view.vocab_size)  # of a first token without context
    bits = [first_cost if first == 0 else 0.0 for first in firsts]
    counts = Counter(part.passage for part in windows)
    left = counts.copy()

    def finished(number: int) -> PassageBits:
        if not math.isfinite(bits[number]):
            raise CdmError(
                f"{view.name} gives text {number + 1} a likelihood that is not a number",
                fix="its weights hold NaN or infinity: take an earlier checkpoint",
            )
        changed = sum(change.end - change.start for change in changes(spans[number]))
        return PassageBits(number, bits[number], changed, counts[number])

    wanted = range(len(passages)) if only is None else only
    yield from (finished(number) for number in wanted if not counts[number])
    inputs, positions = [part.ids for part in windows], [part.scored for part in windows]
    of_wanted = {index for index, part in enumerate(windows) if part.passage in wanted}
    for batch in logits_by_batch(model, inputs, positions, size=batch_size, only=of_wanted):
        for index, logits in batch.by_row():
            bits[windows[index].passage] += _nats(logits, windows[index]) / math.log(2)
            left[windows[index].passage] -= 1
        for number in dict.fromkeys(windows[index].passage for index in batch.rows):
            if number in wanted and not left[number]:
                yield finished(number)


def first_scored(spans: TokenSpans, given: int) -> int:
    """Find the first token with a byte after the given ones, or the first of the zero-width tokens before it."""
    first = int(np.searchsorted(spans.end, given, side="right"))
    while first > 0 and spans.start[first - 1] >= given:
        first -= 1
    return first


def _windows(
    passage: int, ids: list[int], first: int, start: int | None, window: int, stride: int
) -> Iterator[_Window]:
    """Split a passage into windows such that each token from `first` on is a target exactly once."""
    if start is not None:
        ids, first = [start, *ids], first + 1
    target = max(first, 1)  # the next token to score; the token at position 0 has no context
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + window, len(ids) - 1)
        if end >= target:
            yield _Window(passage, tuple(ids[begin:end]), tuple(ids[begin + 1 : end + 1]), target - 1 - begin)
            target = end + 1
        if end == len(ids) - 1:
            return


def _nats(logits: torch.Tensor, part: _Window) -> float:
    """Sum the negative log-likelihood of a window's scored targets, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    targets = torch.tensor(part.targets[part.first :], device=logits.device)
    total = 0.0
    for some, their in zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        total += float(cross_entropy(some.float(), their, reduction="none").double().sum())
    return total


class BpbSettings(Settings):
    """The settings of a bits-per-byte suite."""

    scored: Literal["text", "completion"] = "text"
    window: int = Field(default=1024, ge=2)
    stride: int = Field(default=512, ge=1)


class BitsPerByte:
    """Score models by the bits per byte of a suite's rows."""

    Settings = BpbSettings

    def __init__(self, spec: SuiteSpec, ask: Ask) -> None:
        refuse(spec, ask, "tasks", "fewshot_data", "include_path", "chat_template")
        self._settings: BpbSettings = spec.settings
        self._batch_size = ask.batch_size
        data = find_data(spec, ask.data)
        self._passages: dict[str, Passage] = {}
        for row in read_passages(data.path, ask.limit):
            passage = Passage(row.text, row.completion_start if self._settings.scored == "completion" else 0)
            if not passage.scored_bytes:
                raise BadRow(data.path, row.number, "has no text to score", "remove it")
            self._passages[str(row.number)] = passage
        settings = self._settings
        setting = f"{settings.scored}, windows of {settings.window} tokens moved by {settings.stride}"
        rows = [[key, passage.text, passage.given] for key, passage in self._passages.items()]
        self.contents = Contents(tuple(self._passages), data.source, setting, fingerprint(rows))

    def score(self, subject: Subject, keys: Sequence[str]) -> Iterator[Item]:
        settings, names = self._settings, self.contents.keys
        for measured in passage_bits(
            subject,
            list(self._passages.values()),
            window=settings.window,
            stride=settings.stride,
            batch_size=self._batch_size,
            only={names.index(key) for key in keys},
        ):
            passage = self._passages[names[measured.passage]]
            given = passage.text.encode()[: passage.given].decode("utf-8", errors="replace")
            yield Item(
                names[measured.passage],
                scores={"bits": measured.bits, "bytes": float(passage.scored_bytes)},
                prompt=given,
                reference=passage.text[len(given) :],
                details={"changed_bytes": measured.changed_bytes, "windows": measured.windows},
            )

    def summarize(self, items: Sequence[Item]) -> Summary:
        bits, scored_bytes = (np.array([item.scores[name] for item in items]) for name in ("bits", "bytes"))
        value, stderr = bits_per_byte(bits, scored_bytes)
        notes = []
        if more := sum(max(0, item.details["windows"] - 1) for item in items):
            notes.append(
                f"{more} windows beyond the first: context of at most {self._settings.window} tokens"
            )
        if changed := sum(item.details["changed_bytes"] for item in items):
            notes.append(f"{changed} bytes are not spelled by this tokenizer's tokens: too low a value")
        score = Score("bits per byte", value, stderr, len(items), higher_is_better=False)
        return Summary((score,), tuple(notes))
