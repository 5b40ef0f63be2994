"""Bits per byte: the likelihood of a text that compares across tokenizers.

The negative log-likelihood of all tokens of a text, in bits, over the bytes of its UTF-8. Every byte is paid
for by the token that spells it, whatever the tokenizer, and nothing else is: special tokens that a tokenizer
would add are context at most. The end of the text is not scored.

The first token needs a context: the beginning-of-sequence token where the tokenizer has one, else its
end-of-sequence token (as lm-eval does), else it is charged the uniform `log2(vocabulary)`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from cdm_toolkit.errors import BadOption, BadRow, CdmError, VocabularyTooSmall
from cdm_toolkit.evaluation.data import find_data, read_passages
from cdm_toolkit.evaluation.results import Score, SuiteResult
from cdm_toolkit.evaluation.run import Ask, Progress, Subject, start_token
from cdm_toolkit.evaluation.suites import SuiteSpec
from cdm_toolkit.tokdiff.spans import TokenSpans

if TYPE_CHECKING:
    import torch

SCORED = ("text", "completion")
LOGITS_AT_ONCE = 2**27  # numbers: half a GiB in float32
ROWS_AT_ONCE = 128  # positions whose float32 log-softmax exists at one time


@dataclass(frozen=True, slots=True)
class Passage:
    """Hold a text to score. Its first `given` bytes are context, which is not scored."""

    text: str
    given: int = 0

    @property
    def scored_bytes(self) -> int:
        return len(self.text.encode()) - self.given


@dataclass(frozen=True, slots=True, eq=False)
class PassageBits:
    """Hold the negative log-likelihood in bits, and the bytes it is spread over, of each passage."""

    bits: Float64[np.ndarray, " passage"]
    scored_bytes: Float64[np.ndarray, " passage"]
    changed_bytes: int
    """Bytes that the tokenizer cannot spell: normalised, dropped or unknown. They cost too little."""
    windows: int

    @property
    def value(self) -> float:
        return float(self.bits.sum() / self.scored_bytes.sum())

    @property
    def stderr(self) -> float | None:
        """Estimate the standard error of the ratio of two sums over passages (delta method)."""
        n = len(self.bits)
        if n < 2:
            return None
        residual = self.bits - self.value * self.scored_bytes
        return float(math.sqrt(n / (n - 1) * np.square(residual).sum()) / self.scored_bytes.sum())


@dataclass(frozen=True, slots=True)
class _Window:
    """One stretch of a passage: the model reads `ids`, and its outputs from `first` on are scored."""

    passage: int
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    first: int


def passage_bits(
    subject: Subject,
    passages: Sequence[Passage],
    *,
    window: int = 1024,
    stride: int = 512,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> PassageBits:
    """Measure how many bits a causal language model needs for each passage.

    A text of more than `window` tokens (or than the model has positions) is read in windows that move by
    `stride`: each token is scored once, with at least `window - stride` tokens before it. The result does not
    depend on `batch_size`, nor on `window` and `stride` where a text fits into one window, up to the rounding
    of floats. A token that spells both the end of the given part and the beginning of the scored one is paid
    for in full: the same bytes divide the bits of every tokenizer, and the value errs upwards only.

    Raises BadOption for a stride outside 1 to window, VocabularyTooSmall where the model has too few rows.
    """
    model, view, start = subject.model, subject.view, start_token(subject.tokenizer)
    window = min(window, getattr(model.config, "max_position_embeddings", None) or window)
    if not 1 <= stride <= window:
        raise BadOption("stride", stride, f"1 to {window}, the tokens of a window")
    spans = view.encode_batch([passage.text for passage in passages])
    firsts = [_first_scored(span, passage.given) for span, passage in zip(spans, passages, strict=True)]
    windows = [
        part
        for number, (span, first) in enumerate(zip(spans, firsts, strict=True))
        for part in _windows(number, span.ids.tolist(), first, start, window, stride)
    ]
    rows = model.get_input_embeddings().weight.shape[0]
    if (top := max((max(part.targets) for part in windows), default=0)) >= rows:
        raise VocabularyTooSmall(view.name, rows, max(view.vocab_size, top + 1))

    bits = np.zeros(len(passages))
    if start is None:
        bits[np.array(firsts) == 0] = math.log2(view.vocab_size)
    done = 0
    for batch in _batches(windows, batch_size, rows):
        for part, nats in zip(batch, _window_nats(model, batch), strict=True):
            bits[part.passage] += nats / math.log(2)
        done += len(batch)
        if progress:
            progress(done, len(windows))
    for number in np.flatnonzero(~np.isfinite(bits)):
        raise CdmError(
            f"{view.name} gives text {number + 1} a likelihood that is not a number",
            fix="its weights hold NaN or infinity: take an earlier checkpoint",
        )
    return PassageBits(
        bits=bits,
        scored_bytes=np.array([passage.scored_bytes for passage in passages], dtype=np.float64),
        changed_bytes=sum(_changed_bytes(span) for span in spans),
        windows=len(windows),
    )


def _first_scored(spans: TokenSpans, given: int) -> int:
    """Find the first token that spells a byte after the given ones, with the zero-width tokens before it."""
    first = int(np.searchsorted(spans.end, given, side="right"))
    while first > 0 and spans.start[first - 1] >= given:
        first -= 1
    return first


def _windows(
    passage: int, ids: list[int], first: int, start: int | None, window: int, stride: int
) -> Iterator[_Window]:
    """Cut one passage into windows in which each token from `first` on is a target once."""
    if start is not None:
        ids, first = [start, *ids], first + 1
    target = max(first, 1)  # the next token to score; one at 0 has no context
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + window, len(ids) - 1)
        if end >= target:
            yield _Window(passage, tuple(ids[begin:end]), tuple(ids[begin + 1 : end + 1]), target - 1 - begin)
            target = end + 1
        if end == len(ids) - 1:
            return


def _batches(windows: Sequence[_Window], batch_size: int, vocabulary: int) -> Iterator[list[_Window]]:
    """Put windows of like length together, longest first, within what the logits may take."""
    batch: list[_Window] = []
    for part in sorted(windows, key=lambda part: -len(part.ids)):
        longest = len(batch[0].ids) if batch else len(part.ids)
        if batch and (len(batch) == batch_size or (len(batch) + 1) * longest * vocabulary > LOGITS_AT_ONCE):
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _window_nats(model: Any, batch: Sequence[_Window]) -> list[float]:
    """Sum the negative log-likelihood of each window's scored targets, in nats.

    Windows are padded on the right, where causal attention lets nothing through.
    """
    import torch

    longest = max(len(part.ids) for part in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, part in enumerate(batch):
        ids[row, : len(part.ids)] = torch.tensor(part.ids)
        mask[row, : len(part.ids)] = 1
    with torch.inference_mode():
        logits = model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).logits
        return [_row_nats(logits[row], part) for row, part in enumerate(batch)]


def _row_nats(logits: torch.Tensor, part: _Window) -> float:
    import torch

    total = 0.0
    for begin in range(part.first, len(part.targets), ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, len(part.targets))
        targets = torch.tensor(part.targets[begin:end], device=logits.device)
        losses = torch.nn.functional.cross_entropy(logits[begin:end].float(), targets, reduction="none")
        total += float(losses.double().sum())
    return total


def _changed_bytes(spans: TokenSpans) -> int:
    """Count the bytes of the text that no token spells exactly."""
    spelled = np.zeros(len(spans.text_bytes), dtype=bool)
    for begin, end in zip(spans.start[spans.exact], spans.end[spans.exact], strict=True):
        spelled[begin:end] = True
    return int((~spelled).sum())


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold the settings of a bits-per-byte suite."""

    scored: str = field(default="text", metadata={"one_of": SCORED})
    window: int = field(default=1024, metadata={"at_least": 2})
    stride: int = field(default=512, metadata={"at_least": 1})


class BitsPerByte:
    """Score models by the bits per byte of a suite's rows."""

    Settings = Settings

    def __init__(self, spec: SuiteSpec, ask: Ask) -> None:
        self._name = spec.name
        self._settings: Settings = spec.settings
        data = find_data(spec, ask.data)
        self._data = data.source
        self._passages = []
        for row in read_passages(data.path, ask.limit):
            passage = Passage(row.text, row.completion_start if self._settings.scored == "completion" else 0)
            if not passage.scored_bytes:
                raise BadRow(data.path, row.number, "has no text to score", "remove it")
            self._passages.append(passage)

    def score(self, subject: Subject, *, batch_size: int, progress: Progress | None) -> SuiteResult:
        settings = self._settings
        began = time.perf_counter()
        measured = passage_bits(
            subject,
            self._passages,
            window=settings.window,
            stride=settings.stride,
            batch_size=batch_size,
            progress=progress,
        )
        seconds = time.perf_counter() - began
        notes = []
        if measured.windows > len(self._passages):
            notes.append(
                f"{measured.windows - len(self._passages)} windows beyond the first: context of at most "
                f"{settings.window} tokens"
            )
        if measured.changed_bytes:
            notes.append(
                f"{measured.changed_bytes} bytes are not spelled by this tokenizer's tokens: too low a value"
            )
        n = len(self._passages)
        score = Score("bits per byte", measured.value, measured.stderr, n, seconds, higher_is_better=False)
        setting = f"{settings.scored}, windows of {settings.window} tokens moved by {settings.stride}"
        return SuiteResult(self._name, subject.name, (score,), self._data, setting, tuple(notes))
