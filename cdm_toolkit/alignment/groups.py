"""The alignment record: a monotone list of groups that covers both token sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int32

KINDS = ("1-1", "1-n", "n-1", "n-m", "1-0", "n-0", "0-1", "0-n")
_KIND_OF = np.array([[-1, 6, 7], [4, 0, 1], [5, 2, 3]])  # index: sizes of both sides, capped at 2


@dataclass(frozen=True, slots=True)
class Group:
    """Teacher tokens `[t0, t1)` and student tokens `[s0, s1)` that are aligned with each other.

    `exact`: both sides have the same bytes, or are special tokens with a common role.

    >>> Group(4, 5, 3, 6, exact=True).kind
    '1-n'
    """

    t0: int
    t1: int
    s0: int
    s1: int
    exact: bool

    @property
    def kind(self) -> str:
        """Name the sizes of both sides, teacher first: one of `KINDS`."""
        return KINDS[_KIND_OF[min(self.t1 - self.t0, 2), min(self.s1 - self.s0, 2)]]


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Groups of teacher and student tokens, in order, that cover both sequences.

    Each row of `groups` is t0, t1, s0, s1. `links` are ordered (teacher, student) token pairs: the DTW path
    where there is one, else every pair of a group. Between two groups with tokens on both sides, unmatched
    teacher tokens come before unmatched student tokens. `n_t` and `n_s` are the lengths of the sequences.
    """

    groups: Int32[np.ndarray, "group 4"]
    exact: Bool[np.ndarray, " group"]
    links: Int32[np.ndarray, "link 2"]
    aligner: str
    n_t: int
    n_s: int

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        for (t0, t1, s0, s1), exact in zip(self.groups.tolist(), self.exact.tolist(), strict=True):
            yield Group(t0, t1, s0, s1, exact)

    def kind_indices(self) -> Int[np.ndarray, " group"]:
        """Return each group's kind as an index into `KINDS`."""
        sizes = np.minimum(self.groups[:, 1::2] - self.groups[:, ::2], 2)
        kinds: Int[np.ndarray, " group"] = _KIND_OF[sizes[:, 0], sizes[:, 1]]
        return kinds

    def kind_counts(self) -> dict[str, int]:
        """Count the groups of each of `KINDS`."""
        counts = np.bincount(self.kind_indices(), minlength=len(KINDS))
        return dict(zip(KINDS, counts.tolist(), strict=True))


def in_order(
    groups: Int[np.ndarray, "group 4"], exact: Bool[np.ndarray, " group"]
) -> tuple[Int[np.ndarray, "group 4"], Bool[np.ndarray, " group"]]:
    """Sort groups that cover both sequences by position; unmatched teacher tokens come first in ties."""
    # t0 + s0 grows from group to group: each has at least one token.
    by_position = np.argsort(groups[:, 0] + groups[:, 2], kind="stable")
    groups, exact = groups[by_position], exact[by_position]
    no_t, no_s = groups[:, 0] == groups[:, 1], groups[:, 2] == groups[:, 3]
    if not no_t.any():
        return groups, exact
    run = np.cumsum(~(no_t | no_s))
    # Stable: a group with both sides, then the 1-0 groups after it, then the 0-1 groups.
    order = np.lexsort((no_t, no_t | no_s, run))
    groups, exact = groups[order], exact[order]
    # An empty range [i, i) of a side begins where the groups before it end.
    for column in (0, 2):
        empty = groups[:, column] == groups[:, column + 1]
        reached = np.concatenate(([0], np.maximum.accumulate(np.where(empty, 0, groups[:, column + 1]))[:-1]))
        groups[empty, column] = groups[empty, column + 1] = reached[empty]
    return groups, exact
