"""Define the groups by bytes, in plain Python. `bytes` is the fast way to the same."""

from __future__ import annotations

from itertools import accumulate, pairwise

from cdm_toolkit.alignment.markers import Row, match_run
from cdm_toolkit.alignment.sides import Side

Place = tuple[int, int]  # a token's [start, end)


def byte_groups(t: Side, s: Side) -> list[tuple[Row, bool]]:
    """Give the groups, in order, and whether each is exact."""
    text = text_groups(t, s)
    rows: list[Row] = []
    for (_, t0, _, s0), (t1, _, s1, _) in pairwise([(0, 0, 0, 0), *text, (len(t), len(t), len(s), len(s))]):
        rows += match_run([t.roles(i) for i in range(t0, t1)], [s.roles(j) for j in range(s0, s1)], t0, s0)
        if (t1, s1) != (len(t), len(s)):
            rows += [row for row in text if (row[0], row[2]) == (t1, s1)]
    return teacher_first([group for row in rows for group in settle(t, s, row)])


def text_groups(t: Side, s: Side) -> list[Row]:
    """Group the tokens that are not markers, between the cuts that both sides allow; part by part."""
    inside_t = [i for i in range(len(t)) if not t.marker[i]]
    inside_s = [j for j in range(len(s)) if not s.marker[j]]
    rows: list[Row] = []
    while inside_t or inside_s:
        part, tokens_t, tokens_s = next_part(t, inside_t, s, inside_s)
        inside_t, inside_s = inside_t[len(tokens_t) :], inside_s[len(tokens_s) :]
        if tokens_t and tokens_s:
            places_t = [(int(t.start[i]), int(t.end[i])) for i in tokens_t]
            places_s = [(int(s.start[j]), int(s.end[j])) for j in tokens_s]
            edges = [(0, 0), *shared_cuts(places_t, places_s), (len(tokens_t), len(tokens_s))]
            for (a, c), (b, d) in pairwise(edges):
                rows.append((tokens_t[a], tokens_t[b - 1] + 1, tokens_s[c], tokens_s[d - 1] + 1))
        elif tokens_t:
            j = sum(bool(ended <= part) for ended in s.part)
            rows.append((tokens_t[0], tokens_t[-1] + 1, j, j))
        elif tokens_s:
            i = sum(bool(ended <= part) for ended in t.part)
            rows.append((i, i, tokens_s[0], tokens_s[-1] + 1))
    return rows


def next_part(t: Side, inside_t: list[int], s: Side, inside_s: list[int]) -> tuple[int, list[int], list[int]]:
    """Take the tokens up to the first end of a part that no token, of those left, reaches across."""
    for part, end in enumerate(t.parts):
        tokens_t = [i for i in inside_t if t.part[i] <= part]
        tokens_s = [j for j in inside_s if s.part[j] <= part]
        clear = all(t.end[i] <= end for i in tokens_t) and all(s.end[j] <= end for j in tokens_s)
        if clear and (tokens_t or tokens_s):
            return part, tokens_t, tokens_s
    return len(t.parts) - 1, inside_t, inside_s


def shared_cuts(t: list[Place], s: list[Place]) -> list[tuple[int, int]]:
    """Pair each teacher cut with the first student cut, after those taken, that can be at the same byte.

    A cut before token k can be anywhere from the end of token k-1 to its start; there is none where tokens
    overlap.
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
                taken = j  # lies before this and so before all further teacher cuts
    return shared


def settle(t: Side, s: Side, row: Row) -> list[tuple[Row, bool]]:
    """Tell whether a group spells the same on both sides, and then cut it where the spelled bytes allow."""
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


def teacher_first(groups: list[tuple[Row, bool]]) -> list[tuple[Row, bool]]:
    """Between groups that have both sides, put the teacher's unmatched tokens before the student's."""
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
