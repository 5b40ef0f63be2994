"""Warp token strings: `dtw`, and `entropy-dtw` of arXiv 2502.11104. Twin: `dtw_reference`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, UInt64

from cdm_toolkit.alignment import kernels
from cdm_toolkit.alignment.bytes import surely_exact
from cdm_toolkit.alignment.groups import Alignment
from cdm_toolkit.alignment.sides import Side, token_string
from cdm_toolkit.errors import BadOption

_MOST_CELLS = 1 << 34  # of a path's steps, four to a byte: 4 GiB


@dataclass(frozen=True, slots=True, eq=False)
class Warp:
    """A monotone path of token pairs from the first to the last, and what it costs."""

    path: Int32[np.ndarray, "link 2"]
    cost: int


@dataclass(frozen=True, slots=True, eq=False)
class Strings:
    """The distinct tokens of two sequences as symbols, and which of them stands where."""

    t: kernels.Symbols
    of_t: Int64[np.ndarray, " time_t"]
    s: kernels.Symbols
    of_s: Int64[np.ndarray, " time_s"]
    scratch: UInt64[np.ndarray, "2 alphabet"]

    @classmethod
    def of(cls, t: Sequence[bytes], of_t: np.ndarray, s: Sequence[bytes], of_s: np.ndarray) -> Strings:
        """Take the distinct strings of each side, and for each place the number of its string."""
        text_t, text_s = [_whole(token) for token in t], [_whole(token) for token in s]
        chars = "".join(text or "" for text in (*text_t, *text_s))
        points = np.frombuffer(chars.encode("utf-32-le"), np.uint32)
        alphabet, numbers = np.unique(points, return_inverse=True)
        numbers = numbers.astype(np.int32)
        cut = sum(len(text or "") for text in text_t)
        scratch = np.zeros((2, max(256, len(alphabet))), np.uint64)
        return cls(
            _symbols(t, text_t, numbers[:cut]), of_t.astype(np.int64),
            _symbols(s, text_s, numbers[cut:]), of_s.astype(np.int64), scratch,
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
    strings: Strings, weight_t: Int64[np.ndarray, " time_t"], weight_s: Int64[np.ndarray, " time_s"]
) -> Warp:
    """Find the cheapest path: cost(i, j) = Levenshtein(t_i, s_j)·weight_t[i]·weight_s[j].

    Steps (1,1), (1,0), (0,1); of equal ones the diagonal, then the teacher's, then the student's. Neither
    side may be empty. Memory: 2 bits a cell for the path, and the distances of distinct tokens.
    """
    n, m = len(strings.of_t), len(strings.of_s)
    if n * m > _MOST_CELLS:
        raise BadOption("aligner", "dtw", f"anchored, which needs no {n} × {m} table, or shorter texts")
    tokens_t, tokens_s = np.arange(len(strings.t.whole)), np.arange(len(strings.s.whole))
    distance = kernels.distances(strings.t, tokens_t, strings.s, tokens_s, strings.scratch)
    steps, cost = kernels.fill_steps(distance, strings.of_t, strings.of_s, weight_t, weight_s)
    return Warp(kernels.trace(steps, m), int(cost))


def path_groups(path: Int[np.ndarray, "link 2"]) -> Int64[np.ndarray, "group 4"]:
    """Tie the tokens that a path links: its connected components, which begin at each diagonal step.

    >>> path_groups(np.array([[0, 0], [1, 1], [1, 2]])).tolist()
    [[0, 1, 0, 1], [1, 2, 1, 3]]
    """
    first = np.flatnonzero(np.concatenate(([True], np.diff(path, axis=0).sum(axis=1) == 2)))
    last = np.concatenate((first[1:], [len(path)])) - 1
    return np.stack((path[first, 0], path[last, 0] + 1, path[first, 1], path[last, 1] + 1), axis=1).astype(
        np.int64
    )


def strings_of(t: Side, s: Side) -> Strings:
    """Take the distinct tokens of two sides."""
    ids_t, of_t = np.unique(t.ids, return_inverse=True)
    ids_s, of_s = np.unique(s.ids, return_inverse=True)
    return Strings.of(
        [token_string(t.view, i) for i in ids_t.tolist()],
        of_t,
        [token_string(s.view, i) for i in ids_s.tolist()],
        of_s,
    )


def align_by_dtw(
    t: Side,
    s: Side,
    weight_t: Int64[np.ndarray, " time_t"],
    weight_s: Int64[np.ndarray, " time_s"],
    *,
    aligner: str,
) -> Alignment:
    """Group the tokens of two sequences, of whatever texts, by the path through their strings.

    Where one side is empty, the other is one group.
    """
    n, m = len(t), len(s)
    if n and m:
        links = warp(strings_of(t, s), weight_t, weight_s).path
        groups = path_groups(links)
    else:
        groups = np.array([[0, n, 0, m]] if n or m else [], np.int64).reshape(-1, 4)
        links = kernels.product_links(groups)
    return Alignment(groups.astype(np.int32), _spell_the_same(t, s, groups), links, aligner, n, m)


def _spell_the_same(t: Side, s: Side, groups: Int64[np.ndarray, "group 4"]) -> Bool[np.ndarray, " group"]:
    exact = surely_exact(t, s, groups) if t.text == s.text else np.zeros(len(groups), bool)
    for k in np.flatnonzero(~exact).tolist():
        t0, t1, s0, s1 = groups[k].tolist()
        exact[k] = t0 < t1 and s0 < s1 and t.same(t0, t1, s, s0, s1)
    return exact
