"""Dynamic time warping over token strings: `dtw`, and `entropy-dtw` of arXiv 2502.11104.

`dtw_reference` is the definition in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, UInt64

from cdm_toolkit.alignment import kernels
from cdm_toolkit.alignment.bytes import trivially_exact
from cdm_toolkit.alignment.groups import Alignment
from cdm_toolkit.alignment.sides import AlignmentSide, token_string
from cdm_toolkit.errors import BadOption

_MAX_CELLS = 1 << 34  # cells of the step table, at 2 bits each: 4 GiB


@dataclass(frozen=True, slots=True, eq=False)
class WarpingPath:
    """A monotone path of token pairs, from the first pair to the last, and its cost."""

    path: Int32[np.ndarray, "link 2"]
    cost: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenStrings:
    """The distinct token strings of two sequences as symbols, and the index of each token's string."""

    t: kernels.Symbols
    index_t: Int64[np.ndarray, " time_t"]
    s: kernels.Symbols
    index_s: Int64[np.ndarray, " time_s"]
    scratch: UInt64[np.ndarray, "2 alphabet"]
    """Zeroed work space of the edit distance: one bitmask per symbol, for bytes and for characters."""

    @classmethod
    def of(
        cls, t: Sequence[bytes], index_t: np.ndarray, s: Sequence[bytes], index_s: np.ndarray
    ) -> TokenStrings:
        """Encode the distinct strings of each side; `index_t`, `index_s`: index of each token's string."""
        text_t, text_s = [_whole(token) for token in t], [_whole(token) for token in s]
        chars = "".join(text or "" for text in (*text_t, *text_s))
        points = np.frombuffer(chars.encode("utf-32-le"), np.uint32)
        alphabet, numbers = np.unique(points, return_inverse=True)
        numbers = numbers.astype(np.int32)
        cut = sum(len(text or "") for text in text_t)
        scratch = np.zeros((2, max(256, len(alphabet))), np.uint64)
        return cls(
            _symbols(t, text_t, numbers[:cut]), index_t.astype(np.int64),
            _symbols(s, text_s, numbers[cut:]), index_s.astype(np.int64), scratch,
        )  # fmt: skip


def _whole(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _ends(lengths: Sequence[int]) -> Int64[np.ndarray, " token_and_1"]:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(np.array(lengths, np.int64))))


def _symbols(tokens: Sequence[bytes], texts: Sequence[str | None], numbers: np.ndarray) -> kernels.Symbols:
    return kernels.Symbols(
        np.frombuffer(b"".join(tokens), np.uint8).astype(np.int32),
        _ends([len(token) for token in tokens]),
        numbers,
        _ends([len(text or "") for text in texts]),
        np.array([text is not None for text in texts], bool),
    )


def warp(
    strings: TokenStrings, weight_t: Int64[np.ndarray, " time_t"], weight_s: Int64[np.ndarray, " time_s"]
) -> WarpingPath:
    """Find the cheapest path with cost(i, j) = Levenshtein(t_i, s_j)·weight_t[i]·weight_s[j].

    Steps are (1,1), (1,0) and (0,1); ties prefer the diagonal, then the teacher's step, then the student's.
    Neither side may be empty. Memory: 2 bits per cell for the steps, and the distances between distinct
    tokens.
    """
    n, m = len(strings.index_t), len(strings.index_s)
    if n * m > _MAX_CELLS:
        raise BadOption("aligner", "dtw", f"anchored, which needs no {n} × {m} table, or shorter texts")
    tokens_t, tokens_s = np.arange(len(strings.t.whole)), np.arange(len(strings.s.whole))
    distance = kernels.distances(strings.t, tokens_t, strings.s, tokens_s, strings.scratch)
    steps, cost = kernels.fill_steps(distance, strings.index_t, strings.index_s, weight_t, weight_s)
    return WarpingPath(kernels.trace(steps, m), int(cost))


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


def token_strings(t: AlignmentSide, s: AlignmentSide) -> TokenStrings:
    """Encode the distinct token strings of two sides."""
    ids_t, index_t = np.unique(t.ids, return_inverse=True)
    ids_s, index_s = np.unique(s.ids, return_inverse=True)
    return TokenStrings.of(
        [token_string(t.view, i) for i in ids_t.tolist()],
        index_t,
        [token_string(s.view, i) for i in ids_s.tolist()],
        index_s,
    )


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
        links = warp(token_strings(t, s), weight_t, weight_s).path
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
