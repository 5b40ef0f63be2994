"""One row of all models: groups of tokens, within the longest length, cut where all sides end at one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.distill.reading import Reading
from cdm_toolkit.errors import DoesNotSpell

if TYPE_CHECKING:
    from jaxtyping import Float, Int32

    Entropy = Float[np.ndarray, " token"]
    Groups = Int32[np.ndarray, "group 4"]


@dataclass(frozen=True, slots=True, eq=False)
class TeacherFeatures:
    """One row as a teacher reads it.

    A row of `groups` holds t0, t1, s0, s1: teacher tokens `[t0, t1)` and student tokens `[s0, s1)` of the
    completion that belong together, with a token before them on both sides. Without groups, one id is left.
    """

    ids: Int32[np.ndarray, " time_t"]
    groups: Int32[np.ndarray, "group 4"]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """One row as all models read it; `student_ids[label_from:]` are the labels.

    There is one of `teachers` for each teacher, in order; one that could not be aligned has no groups.
    """

    row: int
    student_ids: Int32[np.ndarray, " time_s"]
    label_from: int
    teachers: tuple[TeacherFeatures, ...]

    @property
    def labels(self) -> int:
        return len(self.student_ids) - self.label_from

    @property
    def length(self) -> int:
        """Count the tokens of the longest side."""
        return max(len(self.student_ids), *(len(teacher.ids) for teacher in self.teachers), 0)


def fit(
    row: int, student: Reading, teachers: Sequence[tuple[Reading, Groups]], max_length: int
) -> tuple[Features, bool]:
    """Cut a row to `max_length` tokens on each side that is aligned; says also whether it was cut.

    `teachers` come with their groups (`pairs`). Where a side is too long, the student's ids end at the last
    boundary that is shared with every teacher of which any group fits, and a teacher's at its last group: only
    what is whole has an end of text or turn. Where there is no such boundary, the student is cut alone.
    """
    aligned = [len(groups) > 0 for _, groups in teachers]
    whole = len(student.ids) <= max_length and all(
        len(reading.ids) <= max_length
        for (reading, _), is_aligned in zip(teachers, aligned, strict=True)
        if is_aligned
    )
    kept = [groups for _, groups in teachers]
    end_s = len(student.ids)
    if not whole:
        kept = [groups[(groups[:, 1] <= max_length) & (groups[:, 3] <= max_length)] for groups in kept]
        end_s = _last_shared(kept, otherwise=min(end_s, max_length))
        kept = [groups[groups[:, 3] <= end_s] for groups in kept]
    features = Features(
        row=row,
        student_ids=student.ids[:end_s],
        label_from=student.label_from,
        teachers=tuple(
            _teacher(reading, groups, student, whole)
            for (reading, _), groups in zip(teachers, kept, strict=True)
        ),
    )
    return features, end_s < len(student.ids)


def pairs(
    t: Reading, s: Reading, aligner: str, entropy_t: Entropy | None = None, entropy_s: Entropy | None = None
) -> Groups:
    """Align, and keep the groups with both sides, as places in ids; none where the bytes do not allow it."""
    try:
        alignment = align(t.body, s.body, aligner=aligner, entropy_t=entropy_t, entropy_s=entropy_s)
    except DoesNotSpell:
        return np.empty((0, 4), np.int32)
    groups = alignment.groups
    groups = groups[(groups[:, 0] < groups[:, 1]) & (groups[:, 2] < groups[:, 3])]
    return groups + np.array([t.at, t.at, s.at, s.at], np.int32)


def _last_shared(groups: Sequence[Groups], otherwise: int) -> int:
    """Find the last place at which a group of every teacher that has any ends."""
    ends = [one[:, 3] for one in groups if len(one)]
    shared = reduce(np.intersect1d, ends) if ends else np.empty(0, np.int32)
    return int(shared[-1]) if len(shared) else otherwise


def _teacher(reading: Reading, groups: Groups, student: Reading, whole: bool) -> TeacherFeatures:
    """Keep the groups of what is learned, and pair the ends where nothing was cut off."""
    if not len(groups):
        return TeacherFeatures(reading.ids[:1], groups)
    ids = reading.ids if whole else reading.ids[: groups[-1, 1]]
    groups = groups[(groups[:, 0] >= reading.label_from) & (groups[:, 2] >= student.label_from)]
    if whole and reading.close is not None and student.close is not None:
        end = [reading.close, reading.close + 1, student.close, student.close + 1]
        groups = np.vstack((groups, np.array([end], np.int32)))
    if not len(groups):
        return TeacherFeatures(reading.ids[:1], groups)
    return TeacherFeatures(ids, groups)
