"""Project one vocabulary on the other: each student id stands for a few teacher ids, with weights (X-Token's W)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.spelling import spelled
from cdm_toolkit.vocab_map.types import NO_MATCH

WIDTH = 4
"""Teacher ids of a student id, as the publication has it."""
DECAY = 0.1
"""Ratio of the weights of neighbouring tokens of a spelling."""


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """The sparse matrix W: a row for each student id.

    Unused entries are −1 with weight 0; a row of these alone is an id that stands for no teacher id. An id may come
    twice in a row: its weights then add up.
    """

    ids: Int32[np.ndarray, "vocab_s width"]
    weights: Float32[np.ndarray, "vocab_s width"]


def build_projection(view_t: TokenizerView, view_s: TokenizerView, width: int = WIDTH) -> Projection:
    """Build W by the rules of X-Token (arXiv 2605.21699; NeMo-RL's `minimal_projection_via_multitoken`).

    A student id with an exact partner stands for it with weight 1, every other one for the first `width` teacher
    tokens that spell it, with weights that fall tenfold from one to the next and sum to 1; special tokens without
    a partner stand for nothing. Rows are ordered by weight.
    """
    ids = spelled(view_s, view_t, width)
    weights = np.where(ids >= 0, DECAY ** np.arange(width), 0.0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    ids, weights = _merged(ids, weights)
    order = np.argsort(-weights, axis=-1, kind="stable")
    return Projection(
        np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1).astype(np.float32)
    )


def _merged(
    ids: Int32[np.ndarray, "vocab_s width"], weights: Float64[np.ndarray, "vocab_s width"]
) -> tuple[Int32[np.ndarray, "vocab_s width"], Float64[np.ndarray, "vocab_s width"]]:
    """Give a teacher id that spells several parts of a student id, such as `--` twice, the sum of its weights."""
    ids, weights = ids.copy(), weights.copy()
    for later in range(1, ids.shape[1]):
        for first in range(later):
            same = (ids[:, later] == ids[:, first]) & (ids[:, later] >= 0)
            weights[same, first] += weights[same, later]
            ids[same, later], weights[same, later] = NO_MATCH, 0.0
    return ids, weights


def one_to_one(projection: Projection, size_t: int, *, at_least: float) -> Int64[np.ndarray, " vocab_t"]:
    """Give each teacher id the one student id that stands for it, −1 without one.

    Candidates are student ids whose largest weight is `at_least` this much, for the teacher id that has it. Of several
    the one of most weight is taken, of equal ones the lowest (NeMo-RL's `build_exact_token_map`).
    """
    best = projection.weights.argmax(-1, keepdims=True)
    ids = np.take_along_axis(projection.ids, best, -1)[:, 0]
    weights = np.take_along_axis(projection.weights, best, -1)[:, 0]
    student = np.flatnonzero((weights >= np.float32(at_least)) & (ids >= 0))
    student = student[np.lexsort((student, -weights[student]))]
    teacher, first = np.unique(ids[student], return_index=True)
    partner = np.full(size_t, NO_MATCH, np.int64)
    partner[teacher] = student[first]
    return partner


def heaviest_rows(projection: Projection, size_t: int, most: int) -> Int64[np.ndarray, "vocab_t most"]:
    """List the student ids of each teacher id, up to `most`, those of most weight first; −1 fills up."""
    student, column = np.nonzero((projection.weights > 0) & (projection.ids >= 0))
    teacher, weights = projection.ids[student, column], projection.weights[student, column]
    order = np.lexsort((student, -weights, teacher))
    student, teacher = student[order], teacher[order]
    nth = np.arange(len(teacher)) - np.searchsorted(teacher, teacher)
    found = np.full((size_t, most), NO_MATCH, np.int64)
    found[teacher[nth < most], nth[nth < most]] = student[nth < most]
    return found
