"""Dynamic time warping over token strings: `dtw`, and `entropy-dtw` of arXiv 2502.11104.

`dtw_reference` is the definition in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int, Int16, Int32, Int64
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from cdm_toolkit.alignment import kernels
from cdm_toolkit.alignment.bytes import trivially_exact
from cdm_toolkit.alignment.groups import Alignment
from cdm_toolkit.alignment.sides import AlignmentSide, token_string
from cdm_toolkit.errors import BadOption

_MAX_CELLS = 1 << 34  # cells of the step table, at 2 bits each: 4 GiB


Distances = Int16[np.ndarray, "token_t token_s"]


def token_distances(t: Sequence[bytes], s: Sequence[bytes]) -> Distances:
    """Compute the edit distance of each pair, over characters where both are valid UTF-8, else over bytes."""
    distance: Distances = cdist(t, s, scorer=Levenshtein.distance, dtype=np.int16)
    (at_t, texts_t), (at_s, texts_s) = _texts(t), _texts(s)
    if texts_t and texts_s:
        distance[np.ix_(at_t, at_s)] = cdist(texts_t, texts_s, scorer=Levenshtein.distance, dtype=np.int16)
    return distance


def _texts(tokens: Sequence[bytes]) -> tuple[list[int], list[str]]:
    """List the tokens that are valid UTF-8, with their indices."""
    found = {}
    for i, token in enumerate(tokens):
        with suppress(UnicodeDecodeError):
            found[i] = token.decode()
    return list(found), list(found.values())


@lru_cache(maxsize=1 << 16)
def token_distance(a: bytes, b: bytes) -> int:
    """Compute the edit distance of one pair, as `token_distances`."""
    try:
        return Levenshtein.distance(a.decode(), b.decode())
    except UnicodeDecodeError:
        return Levenshtein.distance(a, b)


def warp(
    distance: Distances,
    index_t: Int64[np.ndarray, " time_t"],
    index_s: Int64[np.ndarray, " time_s"],
    weight_t: Int64[np.ndarray, " time_t"],
    weight_s: Int64[np.ndarray, " time_s"],
) -> tuple[Int32[np.ndarray, "link 2"], int]:
    """Find the cheapest path with cost(i, j) = distance[index_t[i], index_s[j]]·weight_t[i]·weight_s[j], and its cost.

    The path is monotone, from the first pair to the last. Steps are (1,1), (1,0) and (0,1); ties prefer the diagonal,
    then the teacher's step, then the student's. Neither side may be empty. Memory: 2 bits per cell for the steps.
    """
    n, m = len(index_t), len(index_s)
    if n * m > _MAX_CELLS:
        raise BadOption("aligner", "dtw", f"anchored, which needs no {n} × {m} table, or shorter texts")
    steps, cost = kernels.fill_steps(distance, index_t, index_s, weight_t, weight_s)
    return kernels.trace(steps, m), int(cost)


def path_groups(path: Int[np.ndarray, "link 2"]) -> Int64[np.ndarray, "group 4"]:
    """Group the tokens that a path links: its connected components, each begun by a diagonal step.

    >>> path_groups(np.array([[0, 0], [1, 1], [1, 2]])).tolist()
    [[0, 1, 0, 1], [1, 2, 1, 3]]
    """
    first = np.flatnonzero(np.concatenate(([True], np.diff(path, axis=0).sum(axis=1) == 2)))
    last = np.concatenate((first[1:], [len(path)])) - 1
    return np.stack((path[first, 0], path[last, 0] + 1, path[first, 1], path[last, 1] + 1), axis=1).astype(
        np.int64
    )


def distinct_strings(side: AlignmentSide) -> tuple[list[bytes], Int64[np.ndarray, " time"]]:
    """List the strings of a side's distinct ids, and each token's index among them."""
    ids, index = np.unique(side.ids, return_inverse=True)
    return [token_string(side.view, i) for i in ids.tolist()], index


def align_by_dtw(
    t: AlignmentSide,
    s: AlignmentSide,
    weight_t: Int64[np.ndarray, " time_t"],
    weight_s: Int64[np.ndarray, " time_s"],
    *,
    aligner: str,
) -> Alignment:
    """Align two token sequences by DTW over their strings; their texts may differ.

    Where one side is empty, all tokens of the other form one group.
    """
    n, m = len(t), len(s)
    if n and m:
        (strings_t, index_t), (strings_s, index_s) = distinct_strings(t), distinct_strings(s)
        links, _ = warp(token_distances(strings_t, strings_s), index_t, index_s, weight_t, weight_s)
        groups = path_groups(links)
    else:
        groups = np.array([[0, n, 0, m]] if n or m else [], np.int64).reshape(-1, 4)
        links = kernels.product_links(groups)
    return Alignment(groups.astype(np.int32), _same_bytes(t, s, groups), links, aligner, n, m)


def _same_bytes(
    t: AlignmentSide, s: AlignmentSide, groups: Int64[np.ndarray, "group 4"]
) -> Bool[np.ndarray, " group"]:
    exact = trivially_exact(t, s, groups) if t.text == s.text else np.zeros(len(groups), bool)
    for k in np.flatnonzero(~exact).tolist():
        t0, t1, s0, s1 = groups[k].tolist()
        exact[k] = t0 < t1 and s0 < s1 and t.same(t0, t1, s, s0, s1)
    return exact
