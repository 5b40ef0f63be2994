"""Reference implementation of `entropy-dtw` as in arXiv 2502.11104, in plain Python.

`dtw` must give the same result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

Link = tuple[int, int]


def entropy_weights(entropy: Sequence[float]) -> list[int]:
    """Compute entropy weights: floor(3 + 3·sigmoid(4·minmax(H) − 2)); minmax is 0 where all entropies are equal."""
    low, high = min(entropy, default=0.0), max(entropy, default=0.0)
    scaled = [(h - low) / (high - low) if high > low else 0.0 for h in entropy]
    return [math.floor(3 + 3 / (1 + math.exp(-(4 * x - 2)))) for x in scaled]


def token_distance(a: bytes, b: bytes) -> int:
    """Compute the edit distance over characters where both tokens are valid UTF-8, else over bytes."""
    try:
        return levenshtein(a.decode(), b.decode())
    except UnicodeDecodeError:
        return levenshtein(a, b)


def levenshtein(a: str | bytes, b: str | bytes) -> int:
    """Count the fewest insertions, deletions and replacements that turn one sequence into the other."""
    row = list(range(len(b) + 1))
    for i, symbol in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j - 1] + (symbol != other), above[j] + 1, row[j - 1] + 1))
    return row[-1]


def warp(
    tokens_t: Sequence[bytes], tokens_s: Sequence[bytes], weight_t: Sequence[int], weight_s: Sequence[int]
) -> tuple[list[Link], int]:
    """Find the cheapest monotone path and its cost; ties prefer the diagonal, then teacher, then student."""
    distance = cache(token_distance)
    n, m = len(tokens_t), len(tokens_s)
    total = [[0] * m for _ in range(n)]
    for i in range(n):
        for j in range(m):
            cost = distance(tokens_t[i], tokens_s[j]) * weight_t[i] * weight_s[j]
            total[i][j] = cost + min((total[a][b] for a, b in _before(i, j)), default=0)
    path = [(n - 1, m - 1)]
    while steps := _before(*path[-1]):
        path.append(min(steps, key=lambda cell: total[cell[0]][cell[1]]))  # min takes the first of equal ones
    return path[::-1], total[-1][-1]


def _before(i: int, j: int) -> list[Link]:
    return [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]


def path_groups(path: Sequence[Link]) -> list[tuple[int, int, int, int]]:
    """Group the tokens that the path connects: links that share a token are in one group."""
    groups: list[tuple[int, int, int, int]] = []
    for i, j in path:
        if groups and (groups[-1][1] == i + 1 or groups[-1][3] == j + 1):
            t0, _, s0, _ = groups.pop()
            groups.append((t0, i + 1, s0, j + 1))
        else:
            groups.append((i, i + 1, j, j + 1))
    return groups
