"""Reference implementation of the byte groups in plain Python; `bytes` must give the same result."""

from __future__ import annotations

from itertools import accumulate, pairwise

from cdm_toolkit.alignment.sides import AlignmentSide
from cdm_toolkit.alignment.template_tokens import Row, match_markers

ByteRange = tuple[int, int]
"""A token's [start, end)."""


def byte_groups(t: AlignmentSide, s: AlignmentSide) -> list[tuple[Row, bool]]:
    """Return the groups, in order, each with its `exact` flag."""
    text = text_groups(t, s)
    rows: list[Row] = []
    for (_, t0, _, s0), (t1, _, s1, _) in pairwise([(0, 0, 0, 0), *text, (len(t), len(t), len(s), len(s))]):
        rows += match_markers(
            [t.roles(i) for i in range(t0, t1)], [s.roles(j) for j in range(s0, s1)], t0, s0
        )
        if (t1, s1) != (len(t), len(s)):
            rows += [row for row in text if (row[0], row[2]) == (t1, s1)]
    return teacher_tokens_first([group for row in rows for group in refine(t, s, row)])


def text_groups(t: AlignmentSide, s: AlignmentSide) -> list[Row]:
    """Group the tokens that are not markers between the cuts that both sides share, part by part."""
    left_t = [i for i in range(len(t)) if not t.marker[i]]
    left_s = [j for j in range(len(s)) if not s.marker[j]]
    rows: list[Row] = []
    while left_t or left_s:
        part, tokens_t, tokens_s = next_part(t, left_t, s, left_s)
        left_t, left_s = left_t[len(tokens_t) :], left_s[len(tokens_s) :]
        if tokens_t and tokens_s:
            ranges_t = [(int(t.start[i]), int(t.end[i])) for i in tokens_t]
            ranges_s = [(int(s.start[j]), int(s.end[j])) for j in tokens_s]
            edges = [(0, 0), *shared_cuts(ranges_t, ranges_s), (len(tokens_t), len(tokens_s))]
            for (a, c), (b, d) in pairwise(edges):
                rows.append((tokens_t[a], tokens_t[b - 1] + 1, tokens_s[c], tokens_s[d - 1] + 1))
        elif tokens_t:
            j = sum(bool(ended <= part) for ended in s.part)
            rows.append((tokens_t[0], tokens_t[-1] + 1, j, j))
        elif tokens_s:
            i = sum(bool(ended <= part) for ended in t.part)
            rows.append((i, i, tokens_s[0], tokens_s[-1] + 1))
    return rows


def next_part(
    t: AlignmentSide, left_t: list[int], s: AlignmentSide, left_s: list[int]
) -> tuple[int, list[int], list[int]]:
    """Take the tokens up to the first end of a part that none of the remaining tokens spans."""
    for part, end in enumerate(t.parts):
        tokens_t = [i for i in left_t if t.part[i] <= part]
        tokens_s = [j for j in left_s if s.part[j] <= part]
        clear = all(t.end[i] <= end for i in tokens_t) and all(s.end[j] <= end for j in tokens_s)
        if clear and (tokens_t or tokens_s):
            return part, tokens_t, tokens_s
    return len(t.parts) - 1, left_t, left_s


def shared_cuts(t: list[ByteRange], s: list[ByteRange]) -> list[tuple[int, int]]:
    """Pair each teacher cut with the first unused student cut that can be at the same byte.

    A cut before token k can be at any byte from the end of token k-1 to the start of token k; there is none
    where the two tokens overlap. Returns (teacher token, student token) pairs: the tokens after each cut.
    """
    shared, taken = [], 0
    for i in range(1, len(t)):
        for j in range(taken + 1, len(s)):
            from_t, to_t, from_s, to_s = t[i - 1][1], t[i][0], s[j - 1][1], s[j][0]
            if max(from_t, from_s) <= min(to_t, to_s):
                shared.append((i, j))
                taken = j
                break
            if from_s > to_t:
                break
            if from_s <= to_s < from_t:
                taken = j  # before this teacher cut, and so before all later ones
    return shared


def refine(t: AlignmentSide, s: AlignmentSide, row: Row) -> list[tuple[Row, bool]]:
    """Check whether both sides of a group have the same bytes; if so, split it at their shared boundaries."""
    t0, t1, s0, s1 = row
    if t0 == t1 or s0 == s1 or not t.same(t0, t1, s, s0, s1):
        return [(row, False)]
    if t1 - t0 == 1 or s1 - s0 == 1:
        return [(row, True)]
    ends_t = [0, *accumulate(len(token) for token in t.spelled(t0, t1))]
    ends_s = [0, *accumulate(len(token) for token in s.spelled(s0, s1))]
    cuts = shared_cuts(list(pairwise(ends_t)), list(pairwise(ends_s)))
    edges = [(0, 0), *cuts, (t1 - t0, s1 - s0)]
    return [((t0 + a, t0 + b, s0 + c, s0 + d), True) for (a, c), (b, d) in pairwise(edges)]


def teacher_tokens_first(groups: list[tuple[Row, bool]]) -> list[tuple[Row, bool]]:
    """Between groups with tokens on both sides, put unmatched teacher tokens before unmatched student tokens."""
    ordered: list[tuple[Row, bool]] = []
    only_s: list[tuple[Row, bool]] = []
    reached_t = reached_s = 0
    for (t0, t1, s0, s1), exact in [*groups, ((0, 1, 0, 1), False)]:
        if t0 < t1 and s0 == s1:
            ordered.append(((t0, t1, reached_s, reached_s), exact))
            reached_t = t1
        elif t0 == t1:
            only_s.append(((t0, t1, s0, s1), exact))
        else:
            ordered += [((reached_t, reached_t, c, d), is_exact) for (_, _, c, d), is_exact in only_s]
            ordered.append(((t0, t1, s0, s1), exact))
            only_s, reached_t, reached_s = [], t1, s1
    return ordered[:-1]
