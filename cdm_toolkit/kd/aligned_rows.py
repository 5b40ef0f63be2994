"""One row of the student and its teachers: groups of tokens, cut to the longest length at one shared boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Float, Int32

from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.errors import DoesNotSpell
from cdm_toolkit.kd.tokenized_rows import TokenizedRow

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
    """One row of the student and all teachers; `student_ids[label_from:]` are the labels.

    `row` is its number in the data, from 1. There is one of `teachers` for each teacher, in order; one that could
    not be aligned has no groups.
    """

    row: int
    student_ids: Int32[np.ndarray, " time_s"]
    label_from: int
    teachers: tuple[AlignedTeacherRow, ...]

    @property
    def labels(self) -> int:
        return len(self.student_ids) - self.label_from

    @property
    def length(self) -> int:
        """Count the tokens of the longest side."""
        return max(len(self.student_ids), *(len(teacher.ids) for teacher in self.teachers), 0)


def align_groups(
    t: TokenizedRow,
    s: TokenizedRow,
    aligner: str = "anchored",
    entropy_t: Float[np.ndarray, " token_t"] | None = None,
    entropy_s: Float[np.ndarray, " token_s"] | None = None,
) -> Groups:
    """Align a row's two sides; gives the groups with tokens on both, as indices of ids.

    No group where the bytes cannot be aligned: the row is then learned without this teacher.
    """
    try:
        alignment = align(t.body, s.body, aligner=aligner, entropy_t=entropy_t, entropy_s=entropy_s)
    except DoesNotSpell:
        return np.empty((0, 4), np.int32)
    groups = alignment.groups
    groups = groups[(groups[:, 0] < groups[:, 1]) & (groups[:, 2] < groups[:, 3])]
    return groups + np.array([t.body_start, t.body_start, s.body_start, s.body_start], np.int32)


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
    made = AlignedRow(
        row=row,
        student_ids=student.ids[:end_s],
        label_from=student.label_from,
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
    """Keep the groups of what is learned, and pair the ends where nothing was cut off."""
    if not len(groups):
        return AlignedTeacherRow(tokenized.ids[:1], groups)
    ids = tokenized.ids if whole else tokenized.ids[: groups[-1, 1]]
    groups = groups[(groups[:, 0] >= tokenized.label_from) & (groups[:, 2] >= student.label_from)]
    if whole and tokenized.end is not None and student.end is not None:
        end = [tokenized.end, tokenized.end + 1, student.end, student.end + 1]
        groups = np.vstack((groups, np.array([end], np.int32)))
    if not len(groups):
        return AlignedTeacherRow(tokenized.ids[:1], groups)
    return AlignedTeacherRow(ids, groups)
