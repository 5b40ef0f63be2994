"""From rows to features, once, before training: both tokenizations, their alignment, what is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.distill.rows import Row
from cdm_toolkit.errors import DoesNotSpell

if TYPE_CHECKING:
    from jaxtyping import Int32

    from cdm_toolkit.hub.tokenizers import Loaded
    from cdm_toolkit.tokdiff.spans import TokenSpans
    from cdm_toolkit.tokdiff.view import TokenizerView

BATCH = 64
"""Rows that are encoded in one call."""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """One row as both models read it.

    `student_ids[label_from:]` are the labels. A row of `groups` holds t0, t1, s0, s1: teacher tokens `[t0,
    t1)` and student tokens `[s0, s1)` of the completion that belong together, with a token before them on
    both sides.
    """

    row: int
    student_ids: Int32[np.ndarray, " time_s"]
    label_from: int
    teacher_ids: Int32[np.ndarray, " time_t"]
    groups: Int32[np.ndarray, "group 4"]

    @property
    def labels(self) -> int:
        return len(self.student_ids) - self.label_from


@dataclass(frozen=True, slots=True)
class RowCounts:
    """What became of the rows. `read` = `trained` + `empty` + `too_long`."""

    read: int = 0
    trained: int = 0
    cut: int = 0
    """Trained, but only up to a shared boundary: the whole is longer than max_length."""
    unaligned: int = 0
    """Trained, but by cross-entropy alone: no group of the completion has both sides."""
    empty: int = 0
    too_long: int = 0
    """Left out: nothing of the completion is within max_length."""

    def __str__(self) -> str:
        return ", ".join(
            f"{getattr(self, field.name)} {field.name.replace('_', ' ')}" for field in fields(self)
        )


@dataclass(frozen=True, slots=True)
class Side:
    """A tokenizer with the ids that stand around each text, where it has them."""

    view: TokenizerView
    start: int | None
    """Gives the first token of a text a context: bos, else eos (as lm-eval does)."""
    eos: int | None

    @property
    def shift(self) -> int:
        return int(self.start is not None)

    def framed(self, ids: Int32[np.ndarray, " time"], *, ended: bool) -> Int32[np.ndarray, " _"]:
        before = [] if self.start is None else [self.start]
        after = [self.eos] if ended and self.eos is not None else []
        return np.concatenate((before, ids, after)).astype(np.int32)


def side_of(loaded: Loaded) -> Side:
    """Take the ids that stand around a text from a tokenizer's own settings."""
    bos, eos = loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id
    return Side(loaded.view, eos if bos is None else bos, eos)


def _room(side: Side, spans: TokenSpans, max_length: int) -> int | None:
    """Give how many tokens of the text can stay; None where all fit, with what stands around them."""
    whole = side.shift + len(spans) + (side.eos is not None)
    return None if whole <= max_length else max_length - side.shift


def _pairs(t: TokenSpans, s: TokenSpans, aligner: str) -> Int32[np.ndarray, "group 4"]:
    """Align, and keep the groups with both sides; none where the aligner needs bytes that differ."""
    try:
        groups = align(t, s, aligner=aligner).groups
    except DoesNotSpell:
        return np.empty((0, 4), np.int32)
    return groups[(groups[:, 0] < groups[:, 1]) & (groups[:, 2] < groups[:, 3])]


def _fit_alone(row: Row, student: Side, s: TokenSpans, max_length: int) -> tuple[Features, bool]:
    room = _room(student, s, max_length)
    features = Features(
        row=row.number,
        student_ids=student.framed(s.ids[:room], ended=room is None),
        label_from=_label_from(row, student, s),
        teacher_ids=np.empty(0, np.int32),
        groups=np.empty((0, 4), np.int32),
    )
    return features, room is not None


def _label_from(row: Row, student: Side, s: TokenSpans) -> int:
    """Find the first label: a token that begins in the completion, and has one before it."""
    first = int(np.searchsorted(s.start, row.completion_start))  # start never decreases
    return max(student.shift + first, 1)


def _fit_together(
    row: Row, student: Side, teacher: Side, s: TokenSpans, t: TokenSpans, aligner: str, max_length: int
) -> tuple[Features, bool]:
    groups = _pairs(t, s, aligner)
    room_t, room_s = _room(teacher, t, max_length), _room(student, s, max_length)
    cut = room_t is not None or room_s is not None
    end_t, end_s = len(t), len(s)
    if cut:
        limits = (len(t) if room_t is None else room_t, len(s) if room_s is None else room_s)
        fits = groups[(groups[:, 1] <= limits[0]) & (groups[:, 3] <= limits[1])]
        # where nothing is aligned, the student's side is cut alone
        end_t, end_s = (int(fits[-1, 1]), int(fits[-1, 3])) if len(fits) else (0, limits[1])
        groups = fits

    label_from = _label_from(row, student, s)
    inside = (t.start[groups[:, 0]] >= row.completion_start) & (s.start[groups[:, 2]] >= row.completion_start)
    groups = groups[inside] + np.array([teacher.shift] * 2 + [student.shift] * 2)
    if not cut and teacher.eos is not None and student.eos is not None:
        last_t, last_s = teacher.shift + len(t), student.shift + len(s)
        groups = np.vstack((groups, [[last_t, last_t + 1, last_s, last_s + 1]]))
    has_context = (groups[:, 0] > 0) & (groups[:, 2] > 0)
    features = Features(
        row=row.number,
        student_ids=student.framed(s.ids[:end_s], ended=not cut),
        label_from=label_from,
        teacher_ids=teacher.framed(t.ids[:end_t], ended=not cut),
        groups=groups[has_context].astype(np.int32),
    )
    return features, cut


def _encoded(
    rows: Sequence[Row], student: Side, teacher: Side | None
) -> Iterator[tuple[Row, TokenSpans, TokenSpans | None]]:
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        texts = [row.text for row in some]
        s = student.view.encode_batch(texts)
        t: Iterable[TokenSpans | None] = teacher.view.encode_batch(texts) if teacher else [None] * len(texts)
        yield from zip(some, s, t, strict=True)


def build_features(
    rows: Sequence[Row],
    student: Side,
    teacher: Side | None,
    *,
    aligner: str = "anchored",
    max_length: int = 512,
    on_row: Callable[[int], None] = lambda _done: None,
) -> tuple[list[Features], RowCounts]:
    """Tokenize each row on both sides, align, and cut what is too long at a shared boundary.

    `max_length` is in tokens of either side, with those that stand around the text.
    Each side gets its own bos (or eos) at the start, and its own eos at the end of what is not cut: where
    both have an eos, these two are a group. A token is a label when it begins in the completion; one that
    straddles the boundary is not. Without a teacher (`sft`) there are no groups.
    """
    kept: list[Features] = []
    cut = unaligned = empty = too_long = 0
    for done, (row, s, t) in enumerate(_encoded(rows, student, teacher), 1):
        on_row(done)
        if not row.completion:
            empty += 1
            continue
        if t is None or teacher is None:
            features, was_cut = _fit_alone(row, student, s, max_length)
        else:
            features, was_cut = _fit_together(row, student, teacher, s, t, aligner, max_length)
        if features.labels <= 0:
            too_long += 1
            continue
        kept.append(features)
        cut += was_cut
        unaligned += teacher is not None and not len(features.groups)
    return kept, RowCounts(len(rows), len(kept), cut, unaligned, empty, too_long)
