"""Edit distance between two vocabularies: all near pairs, or each query's nearest choice, without trying all pairs.

Most of the billions of pairs are ruled out by two cheap lower bounds of the distance: the difference in length, and
the number of symbols that only one of the strings has, counted on 64-bit signatures. The rest are computed with
Myers' bit-parallel algorithm (J. ACM 46(3), 1999). The reference implementations try every pair with rapidfuzz.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from cdm_toolkit.alignment.kernels import compiled

ProgressCallback = Callable[[int, int], None]
Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Query, choice and edits of each pair."""

# Longest pattern that fits one machine word in Myers' algorithm; longer ones use the dynamic programme.
WORD = 64
# Queries per task: small enough for even load and a smooth progress bar, large enough to hide the call overhead.
CHUNK = 256
# Distances at which the nearest choice is looked for, one after the other: most queries have one at the first two.
WIDENING = (0.15, 0.25, 0.35, 0.5, 1.0)


class PackedStrings(NamedTuple):
    """Strings as concatenated symbol codes, sorted by length; `order[i]` is the caller's name of string i: its
    index, or an id.

    `must_match` codes must be equal for two strings to be compared at all; the lower `tie` wins at equal distance.
    """

    codes: Int32[np.ndarray, " symbols"]
    start: Int64[np.ndarray, " strings"]
    length: Int32[np.ndarray, " strings"]
    signature: UInt64[np.ndarray, " strings"]
    must_match: Int32[np.ndarray, " strings"]
    tie: Int32[np.ndarray, " strings"]
    order: Int64[np.ndarray, " strings"]
    first_of_length: Int64[np.ndarray, " lengths"]


@dataclass(frozen=True, slots=True, eq=False)
class NearPairs:
    """Pairs of a query and a choice, with the number of edits, the sum of both lengths, and the choice's `tie`."""

    query: Int64[np.ndarray, " pairs"]
    choice: Int64[np.ndarray, " pairs"]
    edits: Int32[np.ndarray, " pairs"]
    total: Int32[np.ndarray, " pairs"]
    tie: Int32[np.ndarray, " pairs"]


def pack(
    queries: Sequence[str] | Sequence[bytes],
    choices: Sequence[str] | Sequence[bytes],
    must_match_codes: tuple[Int32[np.ndarray, " queries"], Int32[np.ndarray, " choices"]],
    tie: Int32[np.ndarray, " choices"],
) -> tuple[PackedStrings, PackedStrings]:
    """Pack two lists of strings over one alphabet: characters for `str`, bytes for `bytes`."""
    texts = [*queries, *choices]
    length = np.fromiter((len(text) for text in texts), np.int32, len(texts))
    if texts and isinstance(texts[0], bytes):
        codes = np.frombuffer(b"".join(texts), np.uint8).astype(np.int32)
    else:
        utf32 = "".join(texts).encode("utf-32-le", "surrogatepass")
        codes = np.unique(np.frombuffer(utf32, np.uint32), return_inverse=True)[1].astype(np.int32)
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(length, dtype=np.int64)])[:-1]
    signature = _signatures(codes, start, length)
    ranks = np.concatenate([np.zeros(len(queries), np.int32), tie])
    must_match = np.concatenate(must_match_codes)

    def side(lo: int, hi: int) -> PackedStrings:
        order = np.lexsort((ranks[lo:hi], length[lo:hi]))
        at = order + lo
        bounds = np.searchsorted(length[at], np.arange(int(length.max(initial=0)) + 2))
        return PackedStrings(
            codes, start[at], length[at], signature[at], must_match[at], ranks[at], order, bounds
        )

    return side(0, len(queries)), side(len(queries), len(texts))


def near_pairs(
    queries: PackedStrings,
    choices: PackedStrings,
    progress: ProgressCallback | None = None,
    *,
    max_edit_distance: float,
    workers: int = 1,
) -> NearPairs:
    """Find all pairs with edits / (sum of lengths) < max_edit_distance and equal `must_match`.

    `query` and `choice` of the result are the caller's indices.
    """
    limits = _limits(queries, choices, max_edit_distance)
    return _found(partial(_near, queries, choices, limits, 0), queries, choices, progress, workers)


def nearest(
    queries: PackedStrings,
    choices: PackedStrings,
    progress: ProgressCallback | None = None,
    *,
    workers: int = 1,
) -> NearPairs:
    """Find each query's choice with the least edits / (sum of lengths); ties go to the lowest `tie`.

    A choice must have equal `must_match` and keep at least one symbol (edits below the longer length). Queries
    without such a choice are left out.
    """
    limits = [_limits(queries, choices, distance) for distance in WIDENING]
    return _found(partial(_nearest, queries, choices, limits), queries, choices, progress, workers)


def _nearest(
    queries: PackedStrings, choices: PackedStrings, limits: Sequence[np.ndarray], rows: np.ndarray
) -> Found:
    """Widen the distance until each query has a choice."""
    found: list[Found] = []
    for limit in limits:
        query, choice, edits = _near(queries, choices, limit, 1, rows)
        distance = edits / (queries.length[query] + choices.length[choice])
        order = np.lexsort((choices.tie[choice], distance, query))
        first = order[np.diff(query[order], prepend=-1) != 0]
        found.append((query[first], choice[first], edits[first]))
        rows = np.setdiff1d(rows, query)
    query, choice, edits = map(np.concatenate, zip(*found, strict=True))
    return query, choice, edits


def _found(
    find: Callable[[np.ndarray], Found],
    queries: PackedStrings,
    choices: PackedStrings,
    progress: ProgressCallback | None,
    workers: int,
) -> NearPairs:
    """Run `find` on chunks of the queries in threads; its compiled kernels release the GIL."""
    count = len(queries.order)
    chunks = [np.arange(lo, min(lo + CHUNK, count)) for lo in range(0, count, CHUNK)]
    parts: list[Found] = [(np.zeros(0, np.int32),) * 3]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for rows, part in zip(chunks, pool.map(find, chunks), strict=True):
            if progress is not None:
                progress(int(rows[-1]) + 1, count)
            parts.append(part)
    query, choice, edits = map(np.concatenate, zip(*parts, strict=True))
    total = queries.length[query] + choices.length[choice]
    return NearPairs(queries.order[query], choices.order[choice], edits, total, choices.tie[choice])


def _limits(
    queries: PackedStrings, choices: PackedStrings, max_edit_distance: float
) -> Int32[np.ndarray, " totals"]:
    """Return, for each sum of lengths, the largest number of edits below max_edit_distance; −1 if none."""
    longest = int(queries.length.max(initial=0)) + int(choices.length.max(initial=0))
    limit = np.full(longest + 1, -1, np.int32)
    for total in range(1, longest + 1):
        edits = int(max_edit_distance * total) + 1
        while edits >= 0 and not edits / total < max_edit_distance:
            edits -= 1
        limit[total] = edits
    return limit


@compiled
def _signatures(codes: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Hash each (symbol, occurrence number) to a bit: one edit adds and removes at most one bit."""
    out = np.zeros(len(start), np.uint64)
    for row in range(len(start)):
        bits = np.uint64(0)
        for i in range(length[row]):
            symbol = codes[start[row] + i]
            before = 0
            for j in range(i):
                before += codes[start[row] + j] == symbol
            mixed = np.uint64(symbol + 1) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(before) * np.uint64(
                0xC2B2AE3D27D4EB4F
            )
            bits |= np.uint64(1) << (mixed >> np.uint64(58))
        out[row] = bits
    return out


@compiled
def _ones(x: np.uint64) -> np.uint64:
    """Count the set bits; LLVM compiles this to a popcount instruction where there is one."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@compiled
def _bounds(signature: np.uint64, signatures: np.ndarray, lo: int, hi: int, out: np.ndarray) -> None:
    """Write lower bounds of the distances to choices lo to hi: the larger one-sided difference of signatures."""
    for i in range(hi - lo):
        other = signatures[lo + i]
        out[i] = max(_ones(signature & ~other), _ones(other & ~signature))


@compiled
def _set_pattern(pattern: np.ndarray, codes: np.ndarray, start: int, length: int) -> None:
    for i in range(min(length, WORD)):
        pattern[codes[start + i]] |= np.uint64(1) << np.uint64(i)


@compiled
def _clear_pattern(pattern: np.ndarray, codes: np.ndarray, start: int, length: int) -> None:
    for i in range(min(length, WORD)):
        pattern[codes[start + i]] = np.uint64(0)


@compiled
def _myers(pattern: np.ndarray, length: int, codes: np.ndarray, start: int, other: int, limit: int) -> int:
    """Return the edit distance of the pattern to codes[start : start + other], capped at limit + 1."""
    one = np.uint64(1)
    positive = ~np.uint64(0)
    negative = np.uint64(0)
    last = one << np.uint64(length - 1)
    edits = length
    for i in range(other):
        match = pattern[codes[start + i]]
        vertical = match | negative
        diagonal = (((match & positive) + positive) ^ positive) | match
        up = negative | ~(diagonal | positive)
        down = positive & diagonal
        if up & last:
            edits += 1
        elif down & last:
            edits -= 1
        if edits - (other - 1 - i) > limit:
            return limit + 1
        up = (up << one) | one
        down = down << one
        positive = down | ~(vertical | up)
        negative = up & vertical
    return min(edits, limit + 1)


@compiled
def _dynamic_programme(codes: np.ndarray, a: int, length: int, b: int, other: int) -> int:
    """Return the edit distance by dynamic programming, one row at a time."""
    row = np.arange(other + 1)
    for i in range(length):
        corner, row[0] = row[0], i + 1
        for j in range(other):
            change = corner + (codes[a + i] != codes[b + j])
            corner = row[j + 1]
            row[j + 1] = min(change, corner + 1, row[j] + 1)
    return int(row[other])


@compiled
def _distance(
    pattern: np.ndarray, codes: np.ndarray, a: int, length: int, b: int, other: int, limit: int
) -> int:
    if length <= WORD:
        return _myers(pattern, length, codes, b, other, limit)
    return min(_dynamic_programme(codes, a, length, b, other), limit + 1)


@compiled
def _near(
    queries: PackedStrings,
    choices: PackedStrings,
    limits: np.ndarray,
    common: int,
    rows: np.ndarray,
) -> Found:
    """Find the choices of some queries, with edits up to the limit of the sum of lengths, and `common` symbols kept."""
    pattern = np.zeros(queries.codes.max() + 1, np.uint64)
    bound = np.empty(len(choices.start), np.uint8)
    size, used = 1024, 0
    query, choice, edits = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    for q in rows:
        length = queries.length[q]
        _set_pattern(pattern, queries.codes, queries.start[q], length)
        for other in range(1, len(choices.first_of_length) - 1):
            limit = limits[length + other] if length + other < len(limits) else -1
            limit = min(limit, max(length, other) - common)
            if limit < abs(length - other) or length == 0:
                continue
            first, last = choices.first_of_length[other], choices.first_of_length[other + 1]
            _bounds(queries.signature[q], choices.signature, first, last, bound)
            for i in range(last - first):
                c = first + i
                if bound[i] > limit or queries.must_match[q] != choices.must_match[c]:
                    continue
                found = _distance(
                    pattern, queries.codes, queries.start[q], length, choices.start[c], other, limit
                )
                if found > limit:
                    continue
                if used == size:
                    size *= 2
                    query, choice = _grown(query, size), _grown(choice, size)
                    edits = _grown(edits, size)
                query[used], choice[used], edits[used] = q, c, found
                used += 1
        _clear_pattern(pattern, queries.codes, queries.start[q], length)
    return query[:used].copy(), choice[:used].copy(), edits[:used].copy()


@compiled
def _grown(values: np.ndarray, size: int) -> np.ndarray:
    out = np.empty(size, values.dtype)
    out[: len(values)] = values
    return out
