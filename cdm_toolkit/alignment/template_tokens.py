"""Match the tokens outside the text: special tokens by role, and template text between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from itertools import pairwise

Row = tuple[int, int, int, int]
Roles = Set[str]


def pair_by_role(t: Sequence[Roles], s: Sequence[Roles]) -> list[tuple[int, int]]:
    """Find the longest common subsequence of tokens that share a role, as index pairs.

    Of several longest ones, return the one with the earliest pairs. The result is symmetric: swapping the
    sides swaps each pair.

    >>> bos, turn_end, header = {"bos"}, {"eos", "turn_end"}, {"header_start"}
    >>> pair_by_role([bos, turn_end], [bos, header, turn_end])
    [(0, 0), (1, 2)]
    """
    longest = [[0] * (len(s) + 1) for _ in range(len(t) + 1)]
    for i in reversed(range(len(t))):
        for j in reversed(range(len(s))):
            taken = 1 + longest[i + 1][j + 1] if t[i] & s[j] else 0
            longest[i][j] = max(taken, longest[i + 1][j], longest[i][j + 1])
    pairs, i, j = [], 0, 0
    while left := longest[i][j]:
        _, _, _, a, b = min(
            (a + b, max(a, b), sorted(t[a] | s[b]), a, b)
            for a in range(i, len(t))
            for b in range(j, len(s))
            if t[a] & s[b] and longest[a + 1][b + 1] == left - 1
        )
        pairs.append((a, b))
        i, j = a + 1, b + 1
    return pairs


def match_markers(t: Sequence[Roles], s: Sequence[Roles], t0: int, s0: int) -> list[Row]:
    """Group the markers at one byte offset; those without a role are template text.

    `t0` and `s0` are the positions of the first marker on each side. Between matched special tokens, the
    runs of template text of both sides are grouped in order; each unmatched special token forms a group
    alone.
    """
    special_t = [i for i, roles in enumerate(t) if roles]
    special_s = [j for j, roles in enumerate(s) if roles]
    pairs = pair_by_role([t[i] for i in special_t], [s[j] for j in special_s])
    matched = [(special_t[i], special_s[j]) for i, j in pairs]
    rows: list[Row] = []
    for (i0, j0), (i1, j1) in pairwise([(-1, -1), *matched, (len(t), len(s))]):
        rows += _between(t, s, (i0 + 1, i1, j0 + 1, j1))
        if i1 < len(t):
            rows.append((i1, i1 + 1, j1, j1 + 1))
    return [(t0 + a, t0 + b, s0 + c, s0 + d) for a, b, c, d in rows]


def _between(t: Sequence[Roles], s: Sequence[Roles], row: Row) -> Iterator[Row]:
    a, last_t, c, last_s = row
    while a < last_t or c < last_s:
        b, d = _text_end(t, a, last_t), _text_end(s, c, last_s)
        if a < b or c < d:
            yield a, b, c, d
        if b < last_t:
            yield b, b + 1, d, d
            b += 1
        if d < last_s:
            yield b, b, d, d + 1
            d += 1
        a, c = b, d


def _text_end(roles: Sequence[Roles], first: int, last: int) -> int:
    return next((i for i in range(first, last) if roles[i]), last)
