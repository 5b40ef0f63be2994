"""Loops over arrays, compiled by numba. The `*_reference` modules define what they compute in plain Python.

All kernels are in one file because numba's cache on disk is invalidated when the file of a function changes, but
not when a function that it calls in another file does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np
from jaxtyping import Bool, Int16, Int32, Int64, UInt8

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function with numba, without the GIL, cached on disk."""
    # Compile the function itself, not the jaxtyping wrapper that checks shapes in the tests.
    return cast(F, numba.njit(cache=True, nogil=True)(inspect.unwrap(function)))


@compiled
def shared_cuts(
    start_t: Int64[np.ndarray, " time_t"],
    end_t: Int64[np.ndarray, " time_t"],
    start_s: Int64[np.ndarray, " time_s"],
    end_s: Int64[np.ndarray, " time_s"],
) -> Int64[np.ndarray, "cut 2"]:
    """Find the cuts that both sides share, each as the pair of tokens after it, in one pass.

    Before token i the text can be cut at any byte in [end[i-1], start[i]]; a teacher cut and a student cut are
    shared where these ranges intersect. Of several that do, the earliest is taken: zero-width tokens, and
    tokens next to dropped text, are grouped with what follows them.
    """
    n, m = len(start_t), len(start_s)
    cuts = np.empty((max(0, min(n, m) - 1), 2), np.int64)
    count, i, j = 0, 1, 1
    while i < n and j < m:
        if end_t[i - 1] > start_t[i] or start_t[i] < end_s[j - 1]:
            i += 1
        elif end_s[j - 1] > start_s[j] or start_s[j] < end_t[i - 1]:
            j += 1
        else:
            cuts[count, 0], cuts[count, 1] = i, j
            count, i, j = count + 1, i + 1, j + 1
    return cuts[:count]


@compiled
def _fills(
    start: Int64[np.ndarray, " time"],
    end: Int64[np.ndarray, " time"],
    plain: Bool[np.ndarray, " time"],
    first: int,
    last: int,
) -> bool:
    for i in range(first, last):
        gap = i > first and start[i] != end[i - 1]
        if gap or not plain[i]:
            return False
    return True


@compiled
def trivially_exact(
    groups: Int64[np.ndarray, "group 4"],
    start_t: Int64[np.ndarray, " time_t"],
    end_t: Int64[np.ndarray, " time_t"],
    plain_t: Bool[np.ndarray, " time_t"],
    start_s: Int64[np.ndarray, " time_s"],
    end_s: Int64[np.ndarray, " time_s"],
    plain_s: Bool[np.ndarray, " time_s"],
) -> Bool[np.ndarray, " group"]:
    """Mark the groups of plain tokens (exact, not markers) that cover the same bytes without a gap."""
    sure = np.zeros(len(groups), np.bool_)
    for k in range(len(groups)):
        t0, t1, s0, s1 = groups[k]
        if t0 == t1 or s0 == s1 or start_t[t0] != start_s[s0] or end_t[t1 - 1] != end_s[s1 - 1]:
            continue
        sure[k] = _fills(start_t, end_t, plain_t, t0, t1) and _fills(start_s, end_s, plain_s, s0, s1)
    return sure


@compiled
def product_links(groups: Int64[np.ndarray, "group 4"]) -> Int32[np.ndarray, "link 2"]:
    """Link every teacher token of a group with every student token of the group."""
    count = 0
    for k in range(len(groups)):
        count += (groups[k, 1] - groups[k, 0]) * (groups[k, 3] - groups[k, 2])
    links = np.empty((count, 2), np.int32)
    at = 0
    for k in range(len(groups)):
        for i in range(groups[k, 0], groups[k, 1]):
            for j in range(groups[k, 2], groups[k, 3]):
                links[at, 0], links[at, 1] = i, j
                at += 1
    return links


# Dynamic time warping

_DIAGONAL, _TEACHER, _STUDENT = 0, 1, 2


@compiled
def fill_steps(
    distance: Int16[np.ndarray, "row col"],
    row: Int64[np.ndarray, " time_t"],
    col: Int64[np.ndarray, " time_s"],
    weight_t: Int64[np.ndarray, " time_t"],
    weight_s: Int64[np.ndarray, " time_s"],
) -> tuple[UInt8[np.ndarray, "time_t time_s_4"], int]:
    """Fill the DTW table: the cheapest step into each cell (2 bits, four per byte), and the total cost.

    The cost of cell (i, j) is distance[row[i], col[j]]·weight_t[i]·weight_s[j]. Of the accumulated costs only
    two rows are kept.
    """
    n, m = len(row), len(col)
    steps = np.zeros((n, (m + 3) // 4), np.uint8)
    cost, through, came = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.uint8)
    total = np.empty(m, np.int64)
    for i in range(n):
        here = distance[row[i]]
        for j in range(m):
            cost[j] = here[col[j]] * weight_t[i] * weight_s[j]
        if i == 0:
            total[0] = cost[0]
            came[0] = _DIAGONAL
            for j in range(1, m):
                total[j] = total[j - 1] + cost[j]
                came[j] = _STUDENT
        else:
            through[0] = total[0]
            came[0] = _TEACHER
            for j in range(1, m):  # no dependency between cells, so the compiler vectorises this
                through[j] = min(total[j - 1], total[j])
                came[j] = total[j] < total[j - 1]
            left = through[0] + cost[0]
            total[0] = left
            for j in range(1, m):
                best = through[j]
                if left < best:
                    best = left
                    came[j] = _STUDENT
                left = best + cost[j]
                total[j] = left
        for j in range(m):
            steps[i, j >> 2] |= came[j] << ((j & 3) << 1)
    return steps, total[m - 1]


@compiled
def trace(steps: UInt8[np.ndarray, "time_t time_s_4"], m: int) -> Int32[np.ndarray, "link 2"]:
    """Follow the steps back from the last cell to the first."""
    n = len(steps)
    path = np.empty((n + m - 1, 2), np.int32)
    at, i, j = n + m - 1, n - 1, m - 1
    while True:
        at -= 1
        path[at, 0], path[at, 1] = i, j
        if i == 0 and j == 0:
            return path[at:]
        step = (steps[i, j >> 2] >> ((j & 3) << 1)) & 3
        if step != _STUDENT:
            i -= 1
        if step != _TEACHER:
            j -= 1


@compiled
def warp_stretches(
    stretches: Int64[np.ndarray, "stretch 4"],
    swapped: Bool[np.ndarray, " stretch"],
    distances: Int16[np.ndarray, " pair"],
    weight_t: Int64[np.ndarray, " time_t"],
    weight_s: Int64[np.ndarray, " time_s"],
) -> tuple[Int32[np.ndarray, "link 2"], Int64[np.ndarray, " stretch"]]:
    """Run DTW in each stretch (t0, t1, s0, s1); return the concatenated paths and the length of each.

    `distances` are of the pairs of `product_links`. Where `swapped`, the two sides are exchanged, so that ties prefer
    the student's step.
    """
    longest = (stretches[:, 1] - stretches[:, 0] + stretches[:, 3] - stretches[:, 2]).sum()
    links, lengths = np.empty((longest, 2), np.int32), np.empty(len(stretches), np.int64)
    count = done = 0
    for k in range(len(stretches)):
        t0, t1, s0, s1 = stretches[k]
        n, m = t1 - t0, s1 - s0
        distance = distances[done : done + n * m].reshape(n, m)
        done += n * m
        rows, cols = np.arange(n), np.arange(m)
        if swapped[k]:
            transposed = np.ascontiguousarray(distance.T)
            steps, _ = fill_steps(transposed, cols, rows, weight_s[s0:s1], weight_t[t0:t1])
            path = trace(steps, n)[:, ::-1]
        else:
            steps, _ = fill_steps(distance, rows, cols, weight_t[t0:t1], weight_s[s0:s1])
            path = trace(steps, m)
        lengths[k] = len(path)
        for step in range(len(path)):
            links[count, 0], links[count, 1] = t0 + path[step, 0], s0 + path[step, 1]
            count += 1
    return links[:count], lengths
