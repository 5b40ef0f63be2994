"""Reference implementation of the anchored alignment in plain Python; `anchored` must give the same result."""

from __future__ import annotations

from collections.abc import Sequence

from cdm_toolkit.alignment.bytes_reference import byte_groups
from cdm_toolkit.alignment.dtw_reference import Link, path_groups, warp
from cdm_toolkit.alignment.sides import AlignmentSide, token_string
from cdm_toolkit.alignment.template_tokens import Row


def anchored(
    t: AlignmentSide, s: AlignmentSide, weight_t: Sequence[int], weight_s: Sequence[int]
) -> tuple[list[tuple[Row, bool]], list[Link]]:
    """Return the groups, each with its `exact` flag, and the token links."""
    groups: list[tuple[Row, bool]] = []
    links: list[Link] = []
    for row, exact in byte_groups(t, s):
        t0, t1, s0, s1 = row
        if t1 - t0 < 2 or s1 - s0 < 2:
            groups.append((row, exact))
            links += [(i, j) for i in range(t0, t1) for j in range(s0, s1)]
            continue
        path = warp_stretch(t, s, row, weight_t, weight_s)
        links += [(t0 + i, s0 + j) for i, j in path]
        if exact:
            groups.append((row, True))
        else:
            groups += [((t0 + a, t0 + b, s0 + c, s0 + d), False) for a, b, c, d in path_groups(path)]
    return groups, links


def warp_stretch(
    t: AlignmentSide, s: AlignmentSide, row: Row, weight_t: Sequence[int], weight_s: Sequence[int]
) -> list[Link]:
    """Run DTW on the tokens of one group.

    Ties are broken in favour of the side with more tokens, then the one with the lexicographically greater
    strings, so that swapping teacher and student transposes the alignment.
    """
    t0, t1, s0, s1 = row
    tokens_t = [token_string(t.view, int(i)) for i in t.ids[t0:t1]]
    tokens_s = [token_string(s.view, int(i)) for i in s.ids[s0:s1]]
    if (len(tokens_s), tokens_s) > (len(tokens_t), tokens_t):
        path, _ = warp(tokens_s, tokens_t, weight_s[s0:s1], weight_t[t0:t1])
        return [(i, j) for j, i in path]
    return warp(tokens_t, tokens_s, weight_t[t0:t1], weight_s[s0:s1])[0]
