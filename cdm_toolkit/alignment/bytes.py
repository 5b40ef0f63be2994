"""The `bytes` aligner: group the tokens between the byte boundaries that both sides share.

`bytes_reference` is the definition in plain Python. A cut is a byte offset at which a text can be split between
two tokens; a marker is a token outside the text (see `AlignmentSide`).
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
from jaxtyping import Bool, Int64

from cdm_toolkit.alignment import kernels
from cdm_toolkit.alignment.groups import Alignment, in_order
from cdm_toolkit.alignment.sides import AlignmentSide, require_same_text
from cdm_toolkit.alignment.template_tokens import Row, match_markers

Rows = Int64[np.ndarray, "group 4"]


def align_by_bytes(t: AlignmentSide, s: AlignmentSide) -> Alignment:
    """Group tokens between shared boundaries; `DoesNotSpell` where the sides are of different texts."""
    groups, exact = byte_groups(t, s)
    links = kernels.product_links(groups)
    return Alignment(groups.astype(np.int32), exact, links, "bytes", len(t), len(s))


def byte_groups(t: AlignmentSide, s: AlignmentSide) -> tuple[Rows, Bool[np.ndarray, " group"]]:
    """Find the smallest groups bounded by shared cuts, and which of them have equal bytes on both sides.

    Markers at a shared cut are matched by role. Where the spans of tokens overlap because both tokenizers
    normalized the text, and to the same bytes, the groups are split at the boundaries of the normalized bytes.
    """
    require_same_text(t, s)
    groups = _text_groups(t, s)
    sure = trivially_exact(t, s, groups)
    # The other groups (normalized or dropped text, markers) are checked one by one.
    checked = [fine for row in groups[~sure].tolist() for fine in _refine(t, s, *row)]
    for row in _marker_rows(t, s, groups):
        checked += _refine(t, s, *row)
    if not checked:
        return groups, sure
    rows = np.array([row for row, _ in checked], np.int64).reshape(-1, 4)
    exact = np.array([is_exact for _, is_exact in checked], bool)
    return in_order(np.concatenate((groups[sure], rows)), np.concatenate((sure[sure], exact)))


def _text_groups(t: AlignmentSide, s: AlignmentSide) -> Rows:
    """Group the tokens that are not markers, separately in each part of the text (chat message)."""
    text_t, text_s = np.flatnonzero(~t.marker), np.flatnonzero(~s.marker)
    return np.concatenate(
        [np.zeros((0, 4), np.int64)]
        + [
            _part_groups(t, text_t[a:b], s, text_s[c:d], last_part)
            for a, b, c, d, last_part in _divided(t, text_t, s, text_s)
        ]
    )


def _divided(
    t: AlignmentSide,
    text_t: Int64[np.ndarray, " token_t"],
    s: AlignmentSide,
    text_s: Int64[np.ndarray, " token_s"],
) -> list[tuple[int, int, int, int, int]]:
    """Split the tokens at the ends of parts, except where a token of either side spans the end."""
    divisions = [(0, 0, -1)]
    for part, end in enumerate(t.parts[:-1]):
        i, j = (
            int(np.searchsorted(t.part[text_t], part, "right")),
            int(np.searchsorted(s.part[text_s], part, "right")),
        )
        if (i == 0 or t.end[text_t[i - 1]] <= end) and (j == 0 or s.end[text_s[j - 1]] <= end):
            divisions.append((i, j, part))
    divisions.append((len(text_t), len(text_s), len(t.parts) - 1))
    return [(a, b, c, d, part) for (a, c, _), (b, d, part) in pairwise(divisions)]


def _part_groups(
    t: AlignmentSide,
    text_t: Int64[np.ndarray, " token_t"],
    s: AlignmentSide,
    text_s: Int64[np.ndarray, " token_s"],
    part: int,
) -> Rows:
    if not len(text_t) and not len(text_s):
        return np.zeros((0, 4), np.int64)
    if not len(text_t) or not len(text_s):  # one tokenizer dropped the whole part
        ranges = [
            (side.part.searchsorted(part, "right"),) * 2 if not len(text) else (text[0], text[-1] + 1)
            for side, text in ((t, text_t), (s, text_s))
        ]
        return np.array([[*ranges[0], *ranges[1]]], np.int64)
    cuts = kernels.shared_cuts(t.start[text_t], t.end[text_t], s.start[text_s], s.end[text_s])
    rows = np.empty((len(cuts) + 1, 4), np.int64)
    for text, cut, column in ((text_t, cuts[:, 0], 0), (text_s, cuts[:, 1], 2)):
        rows[0, column], rows[-1, column + 1] = text[0], text[-1] + 1
        rows[1:, column], rows[:-1, column + 1] = text[cut], text[cut - 1] + 1
    return rows


def _marker_rows(t: AlignmentSide, s: AlignmentSide, groups: Rows) -> list[Row]:
    """Match the markers between the groups of text tokens."""
    if not (t.marker.any() or s.marker.any()):
        return []
    ends = np.zeros((len(groups) + 1, 2), np.int64)
    starts = np.full((len(groups) + 1, 2), (len(t), len(s)), np.int64)
    ends[1:], starts[:-1] = groups[:, 1::2], groups[:, ::2]
    rows = []
    for gap in np.flatnonzero((ends < starts).any(axis=1)).tolist():
        (t0, s0), (t1, s1) = ends[gap].tolist(), starts[gap].tolist()
        rows += match_markers(
            [t.roles(i) for i in range(t0, t1)], [s.roles(j) for j in range(s0, s1)], t0, s0
        )
    return rows


def trivially_exact(t: AlignmentSide, s: AlignmentSide, groups: Rows) -> Bool[np.ndarray, " group"]:
    """Mark the groups whose tokens are all exact and cover the same bytes without a gap on both sides."""
    plain_t, plain_s = t.exact & ~t.marker, s.exact & ~s.marker
    return kernels.trivially_exact(groups, t.start, t.end, plain_t, s.start, s.end, plain_s)


def _refine(t: AlignmentSide, s: AlignmentSide, t0: int, t1: int, s0: int, s1: int) -> list[tuple[Row, bool]]:
    """Check whether a group is exact; if so, split it at the boundaries that its token bytes share."""
    if t0 == t1 or s0 == s1 or not t.same(t0, t1, s, s0, s1):
        return [((t0, t1, s0, s1), False)]
    if t1 - t0 == 1 or s1 - s0 == 1:
        return [((t0, t1, s0, s1), True)]
    ends_t = np.array([0, *accumulate(map(len, t.spelled(t0, t1)))], np.int64)
    ends_s = np.array([0, *accumulate(map(len, s.spelled(s0, s1)))], np.int64)
    cuts = kernels.shared_cuts(ends_t[:-1], ends_t[1:], ends_s[:-1], ends_s[1:]).tolist()
    edges = [(0, 0), *cuts, (t1 - t0, s1 - s0)]
    return [((t0 + a, t0 + b, s0 + c, s0 + d), True) for (a, c), (b, d) in pairwise(edges)]
