"""Any method of `kd` as the loss of TRL's experimental GOLDTrainer (github.com/huggingface/trl, 1.16).

The trainer samples, buffers, encodes and runs both models; then it hands over both sides' ids, labels and logits. The
teacher has read a text that was decoded from the student's ids, so the two may spell different bytes: a SentencePiece
tokenizer puts a blank before an answer or takes one away, another normalises, half characters become U+FFFD. What both
spell is learned from the teacher, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.errors import BadOption
from cdm_toolkit.kd.aligned_rows import AlignedRow, AlignedTeacherRow, Groups
from cdm_toolkit.kd.batch import AlignedBatch, Collator
from cdm_toolkit.kd.method import Method
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.teacher_signal import signal_of_logits
from cdm_toolkit.kd.tokenized_rows import END_ROLES, TokenizerSide
from cdm_toolkit.kd.types import SignalRequest, TeacherSignal
from cdm_toolkit.tokdiff.spans import TokenSpans
from cdm_toolkit.tokdiff.view import TokenizerView

__all__ = ["GoldLoss", "set_loss"]

IGNORED = -100
"""The label of what is not learned."""
FIGURES = ("ce", "kd", "matched_mass", "aligned")
Note = Callable[[str, float], object]


def set_loss(
    trainer: Any, method: type[Method[Any, Any]], *, alpha: float = 0.0, **settings: Any
) -> GoldLoss:
    """Make a method the loss of a `GOLDTrainer`, for the tokenizers that it has; gives what is now its `uld_loss_fn`.

    The trainer has to be made with `use_uld_loss=True`, and with `use_extended_uld=False` where a tokenizer is
    SentencePiece. What else changes:

    - The teacher reads an answer up to its end, in place of one that ends in the literal of the student's end token.
    - Answers that the student has sampled have no CE, whatever `alpha` is.
    - With gradient accumulation the loss of a step is the mean of those of its batches, in place of their sum.
    - The log has `ce`, `kd`, `matched_mass` and `aligned`, the share of the student's labels that are in a group.

    BadOption for a trainer with the other loss; raises also as `TokenizerPair` and the method do.
    """
    if getattr(trainer, "teacher_tokenizer", None) is None:
        raise BadOption("use_uld_loss", False, "true: the trainer then asks `uld_loss_fn` for its loss")
    pair = TokenizerPair(trainer.teacher_tokenizer, trainer._tokenizer)

    def note(name: str, value: float) -> None:
        trainer._metrics["train" if trainer.model.training else "eval"][name].append(value)

    loss = GoldLoss(method(pair, **settings), alpha=alpha, note=note)
    loss.method.to(trainer.accelerator.device)
    compute_loss = partial(type(trainer).compute_loss, trainer)

    def compute_loss_of_texts(model: Any, inputs: Mapping[str, Any], *more: Any, **named: Any) -> Any:
        flags = trainer._buffered_on_policy if trainer.model.training else None
        loss.sampled = flags is not None and flags[(trainer._step - 1) % len(flags)]
        texts = loss.texts(inputs["labels"], inputs["input_ids"], inputs["original_prompt_text"])
        return compute_loss(model, {**inputs, "original_completion_text": texts}, *more, **named)

    trainer.compute_loss = compute_loss_of_texts
    trainer.loss_is_scaled_for_ga = False
    trainer.uld_loss_fn = loss
    return loss


class GoldLoss:
    """alpha CE + (1 − alpha) KD of a batch, of what a GOLDTrainer gives its `uld_loss_fn`."""

    use_extended_uld = False
    """Read by the trainer: byte offsets, which it has for byte-level tokenizers alone, are not needed."""

    def __init__(self, method: Method[Any, Any], *, alpha: float = 0.0, note: Note | None = None) -> None:
        """Take a method built for the trainer's teacher and student; `note` is told figures of each batch by name."""
        if not 0 <= alpha <= 1:
            raise BadOption("alpha", alpha, "a number from 0 to 1")
        self.method, self.alpha, self.note = method, alpha, note
        self.sampled = False
        """Whether the student has sampled the answers of the batch: it would learn what it says already, by CE."""

    def __call__(
        self,
        student_logits: Float[Tensor, "batch time_s columns_s"],
        teacher_logits: Float[Tensor, "batch time_t columns_t"],
        student_labels: Int64[Tensor, "batch time_s"],
        teacher_labels: Int64[Tensor, "batch time_t"],
        student_input_ids: Int64[Tensor, "batch time_s"],
        teacher_input_ids: Int64[Tensor, "batch time_t"],
        student_byte_offsets: object = None,
        teacher_byte_offsets: object = None,
    ) -> Float[Tensor, ""]:
        """Compute the loss; means are over the labels and the groups of the batch."""
        batch = self.collate(student_labels, teacher_labels, student_input_ids, teacher_input_ids)
        batch = batch.to(student_logits.device)
        signal = self.method.signal(_Computed(teacher_logits, self.method.pair.vocab_t), batch)
        out = self.method(student_logits, signal, batch)
        if self.note is not None:
            aligned = sum(len(side.student_token_rows) for side in batch.teachers) / max(out.labels, 1)
            figures = torch.stack((out.ce, out.kd, out.matched_mass)).tolist()
            for name, figure in zip(FIGURES, (*figures, aligned), strict=True):
                self.note(name, figure)
        loss: Tensor = self.alpha * (0 if self.sampled else 1) * out.ce + (1 - self.alpha) * out.kd
        return loss

    def texts(
        self,
        student_labels: Int64[Tensor, "batch time_s"],
        student_input_ids: Int64[Tensor, "batch time_s"],
        prompts: Sequence[str],
    ) -> list[str]:
        """Give what the teacher reads of each row's answer: what the student's ids spell, up to their end.

        A blank in front is left out where the prompt has it, or the teacher's tokenizer will put it there.
        """
        dummy_prefix = self.method.pair.teacher.view.scheme.dummy_prefix.decode()
        texts = (
            answer.text.decode(errors="replace")
            for answer in self._students(student_labels, student_input_ids)
        )
        return [
            text.removeprefix(" " if prompt.endswith(" ") else dummy_prefix)
            for text, prompt in zip(texts, prompts, strict=True)
        ]

    def collate(
        self,
        student_labels: Int64[Tensor, "batch time_s"],
        teacher_labels: Int64[Tensor, "batch time_t"],
        student_input_ids: Int64[Tensor, "batch time_s"],
        teacher_input_ids: Int64[Tensor, "batch time_t"],
    ) -> AlignedBatch:
        """Align the rows of both sides as they stand, with their padding: logits of the trainer fit the batch."""
        pair = self.method.pair
        students = self._students(student_labels, student_input_ids)
        teachers = _answers(pair.teacher, teacher_labels, teacher_input_ids)
        rows = [_row(number, *both) for number, both in enumerate(zip(students, teachers, strict=True), 1)]
        return Collator((pair.fingerprints,), ((pair.name_t, pair.name_s),))(rows)

    def _students(self, labels: Tensor, ids: Tensor) -> list[Answer]:
        return _answers(self.method.pair.student, labels, ids)


@dataclass(frozen=True, slots=True)
class _Computed:
    """A teacher whose logits are there already."""

    logits: Float[Tensor, "batch time_t columns_t"]
    vocab: int

    def signal(self, batch: AlignedBatch, request: SignalRequest) -> TeacherSignal:
        (side,) = batch.teachers
        return signal_of_logits(self.logits, side, request, vocab=self.vocab)


# Alignment of ids that both sides have


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The learned tokens of a row, `ids[first:first + len(spans)]`, and what they spell.

    A special token spells its literal, an id that is no token spells nothing; both are marked special. `end` is the
    index, among these tokens, of the one that ends the text: after it come special tokens and blanks alone. One that
    stands within the text is no end, as a student may sample any token.
    """

    ids: Int32[np.ndarray, " time"]
    first: int
    spans: TokenSpans
    end: int | None

    @classmethod
    def of(
        cls, view: TokenizerView, ids: Int64[np.ndarray, " time"], labels: Int64[np.ndarray, " time"]
    ) -> Answer:
        """Find what is learned of a row: from its first label to its last, with a token before it."""
        learned = np.flatnonzero(labels != IGNORED)
        first = max(int(learned[0]), 1) if len(learned) else 1
        spans = _spans(view, ids[first : int(learned[-1]) + 1 if len(learned) else 1])
        return cls(ids.astype(np.int32), first, spans, _end(spans))

    @property
    def text(self) -> bytes:
        """What is spelled before the end."""
        spans = self.spans
        return spans.text_bytes if self.end is None else spans.text_bytes[: spans.start[self.end]]


def _answers(side: TokenizerSide, labels: Tensor, ids: Tensor) -> list[Answer]:
    return [Answer.of(side.view, *both) for both in zip(ids.cpu().numpy(), labels.cpu().numpy(), strict=True)]


def _spans(view: TokenizerView, ids: Int64[np.ndarray, " time"]) -> TokenSpans:
    known = (ids >= 0) & (ids < view.vocab_size)
    pieces = [view.literals[i] if is_known else b"" for i, is_known in zip(ids, known, strict=True)]
    end = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    start = np.concatenate((np.zeros(1, np.int64), end))[:-1]
    special = start == end
    special[known] |= view.is_special[ids[known]]
    exact = np.ones(len(ids), bool)
    return TokenSpans(view, b"".join(pieces), ids.astype(np.int32), start, end, special, exact)


def _end(spans: TokenSpans) -> int | None:
    found = None
    for index in range(len(spans) - 1, -1, -1):
        token = spans.view.special.get(int(spans.ids[index]))
        if token is not None and token.roles & END_ROLES:
            found = index
        elif not spans.special[index] and spans.text_bytes[spans.start[index] : spans.end[index]].strip():
            break
    return found


def _row(number: int, s: Answer, t: Answer) -> AlignedRow:
    learned = [[s.first, s.first + len(s.spans)]] if len(s.spans) else []
    turns = np.array(learned, np.int32).reshape(-1, 2)
    return AlignedRow(number, s.ids, turns, (AlignedTeacherRow(t.ids, _align(t, s)),))


def _align(t: Answer, s: Answer) -> Groups:
    """Find the groups of what both sides spell, and of their ends where the whole text before them is the same."""
    after = s.spans.text_bytes[
        len(s.text) :
    ]  # which the teacher reads as well where `texts` are not what it reads
    common = _common(t.text.removesuffix(after), s.text)
    groups = [_groups(t, s, *block) for block in common]
    at_t, at_s, size = common[-1]
    same = (at_t + size, at_s + size) == (len(t.text), len(s.text)) and (size > 0 or at_t == at_s == 0)
    if same and t.end is not None and s.end is not None:
        ends = t.first + t.end, s.first + s.end
        groups.append(np.array([[ends[0], ends[0] + 1, ends[1], ends[1] + 1]], np.int32))
    return np.concatenate(groups)


Block = tuple[int, int, int]
"""Where a stretch of bytes begins in the teacher's text and in the student's, and how long it is."""


def _common(text_t: bytes, text_s: bytes) -> list[Block]:
    """Find what two texts of one answer have in common: all, or what is before the first difference and after the last.

    One blank before one of them is the tokenizer's.
    """
    blank_t, blank_s = (
        int(one.startswith(b" ") and not other.startswith(b" "))
        for one, other in ((text_t, text_s), (text_s, text_t))
    )
    rest_t, rest_s = text_t[blank_t:], text_s[blank_s:]
    before = _equal(rest_t, rest_s)
    after = _equal(rest_t[before:][::-1], rest_s[before:][::-1])
    first = (blank_t, blank_s, before)
    return [first, (len(text_t) - after, len(text_s) - after, after)] if after else [first]


def _equal(one: bytes, other: bytes) -> int:
    """Count the bytes that are equal, up to the first that differ."""
    shorter = min(len(one), len(other))
    a, b = (np.frombuffer(each, np.uint8, shorter) for each in (one, other))
    differ = np.flatnonzero(a != b)
    return int(differ[0]) if len(differ) else shorter


def _groups(t: Answer, s: Answer, at_t: int, at_s: int, size: int) -> Groups:
    """Align the tokens within a common stretch, but for special ones.

    The first group after a difference is left out: what stands before it is not the same.
    """
    found = [np.empty((0, 4), np.int32)]
    for low, high in _without_special(t, s, at_t, at_s, size):
        bounds_t, bounds_s = _boundaries(t, at_t + low, at_t + high), _boundaries(s, at_s + low, at_s + high)
        shared = np.intersect1d(bounds_t - at_t, bounds_s - at_s)
        if low + at_t + at_s > 0:
            shared = shared[shared > low]
        if len(shared) < 2:
            continue
        (part_t, first_t), (part_s, first_s) = (
            _part(of, at + int(shared[0]), at + int(shared[-1])) for of, at in ((t, at_t), (s, at_s))
        )
        first = np.array([first_t, first_t, first_s, first_s], np.int32)
        found.append(align(part_t, part_s).groups + first)
    return np.concatenate(found)


def _without_special(t: Answer, s: Answer, at_t: int, at_s: int, size: int) -> Iterator[tuple[int, int]]:
    """Split a common stretch at the special tokens of either side."""
    edges = [(0, 0), (size, size)]
    for spans, at in ((t.spans, at_t), (s.spans, at_s)):
        start, end = (offsets[spans.special] - at for offsets in (spans.start, spans.end))
        edges += [(a, b) for a, b in zip(start.tolist(), end.tolist(), strict=True) if b > 0 and a < size]
    edges.sort()
    ends = accumulate((end for _, end in edges), max)
    for low, (high, _) in zip(ends, edges[1:], strict=False):
        if low < high:
            yield low, high


def _boundaries(of: Answer, low: int, high: int) -> Int64[np.ndarray, " boundary"]:
    """Give the ends and starts of tokens within a range of bytes."""
    both = np.concatenate((of.spans.start, of.spans.end))
    return np.unique(both[(low <= both) & (both <= high)])


def _part(of: Answer, low: int, high: int) -> tuple[TokenSpans, int]:
    """Take the tokens that spell a range of bytes as a text of their own; gives also the index of the first."""
    spans = of.spans
    inside: Bool[np.ndarray, " time"] = (spans.start >= low) & (spans.end <= high) & ~spans.special
    (index,) = inside.nonzero()
    cut = TokenSpans(
        spans.view,
        spans.text_bytes[low:high],
        spans.ids[index],
        spans.start[index] - low,
        spans.end[index] - low,
        spans.special[index],
        spans.exact[index],
    )
    return cut, of.first + int(index[0])
