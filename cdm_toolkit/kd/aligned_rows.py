"""One row of the student and its teachers: groups of tokens, cut to the longest length at one shared boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Float, Int32, Int64

from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.errors import DoesNotSpell
from cdm_toolkit.kd.tokenized_rows import Body, TokenizedRow, Turns

Groups = Int32[np.ndarray, "_ 4"]
"""t0, t1, s0, s1 of each group: each teacher has as many as it has."""


@dataclass(frozen=True, slots=True, eq=False)
class AlignedTeacherRow:
    """One row of a teacher.

    A row of `groups` holds t0, t1, s0, s1: teacher tokens `[t0, t1)` and student tokens `[s0, s1)` of the
    completion that spell the same text, with a token before them on both sides. Without groups, one id is left.
    """

    ids: Int32[np.ndarray, " time_t"]
    groups: Int32[np.ndarray, "group 4"]


@dataclass(frozen=True, slots=True, eq=False)
class AlignedRow:
    """One row of the student and all teachers; the student's ids in `turns` are the labels.

    `row` is its number in the data, from 1. There is one of `teachers` for each teacher, in order; one that could
    not be aligned has no groups.
    """

    row: int
    student_ids: Int32[np.ndarray, " time_s"]
    turns: Turns
    teachers: tuple[AlignedTeacherRow, ...]

    @property
    def labels(self) -> int:
        return int((self.turns[:, 1] - self.turns[:, 0]).sum())

    @property
    def label_from(self) -> int:
        """Index of the first label."""
        return int(self.turns[0, 0])

    @property
    def length(self) -> int:
        """Count the tokens of the longest side."""
        return max(len(self.student_ids), *(len(teacher.ids) for teacher in self.teachers), 0)


Entropy = Float[np.ndarray, " _"] | None
"""Entropies along the ids of a row, or along as many of them as a model reads."""


def align_groups(
    t: TokenizedRow,
    s: TokenizedRow,
    aligner: str = "anchored",
    entropy_t: Entropy = None,
    entropy_s: Entropy = None,
) -> Groups:
    """Align a row's two sides; gives the groups with tokens on both, as indices of ids. Ends are paired.

    No group where the bytes cannot be aligned: the row is then learned without this teacher.
    """
    bodies = zip(t.bodies, s.bodies, strict=True)
    return np.concatenate([_align_bodies(*both, aligner, entropy_t, entropy_s) for both in bodies])


def _align_bodies(t: Body, s: Body, aligner: str, entropy_t: Entropy, entropy_s: Entropy) -> Groups:
    weights = {"entropy_t": _of_body(t, entropy_t), "entropy_s": _of_body(s, entropy_s)}
    try:
        groups = align(t.spans, s.spans, aligner=aligner, **weights).groups
    except DoesNotSpell:
        return np.empty((0, 4), np.int32)
    groups = groups[(groups[:, 0] < groups[:, 1]) & (groups[:, 2] < groups[:, 3])]
    groups = groups + np.array([t.start, t.start, s.start, s.start], np.int32)
    is_empty = not (t.spans.text_bytes or s.spans.text_bytes)
    if t.end is None or s.end is None or not (len(groups) or is_empty):
        return groups
    return np.vstack((groups, np.array([[t.end, t.end + 1, s.end, s.end + 1]], np.int32)))


def _of_body(body: Body, entropy: Entropy) -> Entropy:
    """Take the entropies of what is aligned; tokens beyond what a model reads have the mean."""
    if entropy is None:
        return None
    inside = entropy[body.start : body.start + len(body.spans)]
    beyond = np.full(len(body.spans) - len(inside), inside.mean() if len(inside) else 0.0)
    return np.concatenate((inside, beyond)).astype(np.float32)


def truncate_aligned(
    row: int, student: TokenizedRow, teachers: Sequence[tuple[TokenizedRow, Groups]], max_length: int
) -> tuple[AlignedRow, bool]:
    """Cut a row to `max_length` tokens on each side that is aligned; gives also whether it was cut.

    `teachers` come with their groups (`align_groups`). Where a side is too long, the student's ids end at the
    last boundary that is shared with every teacher of which any group fits, and a teacher's at its last group:
    only what is whole has an end of text or turn. Where there is no such boundary, the student is cut alone.
    """
    aligned = [len(groups) > 0 for _, groups in teachers]
    whole = len(student.ids) <= max_length and all(
        len(tokenized.ids) <= max_length
        for (tokenized, _), is_aligned in zip(teachers, aligned, strict=True)
        if is_aligned
    )
    kept = [groups for _, groups in teachers]
    end_s = len(student.ids)
    if not whole:
        kept = [groups[(groups[:, 1] <= max_length) & (groups[:, 3] <= max_length)] for groups in kept]
        end_s = _last_shared(kept, otherwise=min(end_s, max_length))
        kept = [groups[groups[:, 3] <= end_s] for groups in kept]
    turns = np.minimum(student.turns, end_s)
    made = AlignedRow(
        row=row,
        student_ids=student.ids[:end_s],
        turns=turns[turns[:, 0] < turns[:, 1]],
        teachers=tuple(
            _teacher(tokenized, groups, student, whole)
            for (tokenized, _), groups in zip(teachers, kept, strict=True)
        ),
    )
    return made, end_s < len(student.ids)


def _last_shared(groups: Sequence[Groups], otherwise: int) -> int:
    """Find the last index at which a group of every teacher that has any ends."""
    ends = [one[:, 3] for one in groups if len(one)]
    shared = reduce(np.intersect1d, ends) if ends else np.empty(0, np.int32)
    return int(shared[-1]) if len(shared) else otherwise


def _teacher(
    tokenized: TokenizedRow, groups: Groups, student: TokenizedRow, whole: bool
) -> AlignedTeacherRow:
    """Keep the groups of what is learned, within one turn on both sides."""
    ids = tokenized.ids if whole or not len(groups) else tokenized.ids[: groups[-1, 1]]
    turn_t, turn_s = (_turn_of(groups[:, at : at + 2], of.turns) for at, of in ((0, tokenized), (2, student)))
    groups = groups[(turn_t >= 0) & (turn_t == turn_s)]
    return AlignedTeacherRow(ids if len(groups) else tokenized.ids[:1], groups)


def _turn_of(ranges: Int32[np.ndarray, "group 2"], turns: Turns) -> Int64[np.ndarray, " group"]:
    """Tell in which turn each range of tokens lies; −1 for none."""
    turn = np.searchsorted(turns[:, 0], ranges[:, 0], "right") - 1
    return np.where(ranges[:, 1] <= turns[turn, 1], turn, -1)
