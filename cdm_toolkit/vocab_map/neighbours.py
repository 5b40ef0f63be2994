"""The neighbour table: for each id without an exact partner, all ids of the other side within an edit distance.

`static_reference.py` is the definition in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float64, Int32

from cdm_toolkit.errors import BadOption
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.edit_distance import NearPairs, ProgressCallback, near_pairs
from cdm_toolkit.vocab_map.exact import exact_partners
from cdm_toolkit.vocab_map.keys import TokenKey, token_keys
from cdm_toolkit.vocab_map.token_distances import concatenate_pairs, distance_blocks, search_blocks
from cdm_toolkit.vocab_map.types import Neighbours, NeighbourTable, pair_info

DEFAULT_MAX_EDIT_DISTANCE = 0.3


def build_neighbours(
    view_t: TokenizerView,
    view_s: TokenizerView,
    *,
    max_edit_distance: float = DEFAULT_MAX_EDIT_DISTANCE,
    match_digits: bool = True,
    workers: int = 1,
    progress: ProgressCallback | None = None,
) -> NeighbourTable:
    """Find all pairs with Lev(a, b) / (|a| + |b|) < max_edit_distance where a has no exact partner, in both directions.

    Whitespace and word marks at both ends are stripped first; whitespace-only tokens and special tokens have no
    neighbours. Lengths are in characters, or in bytes where either token is not valid UTF-8. With `match_digits`,
    digits and operators must be equal (`keys.must_match`). `progress` gets (done, total). BadOption for
    max_edit_distance outside (0, 1) or workers below 1. Source: arXiv 2502.11104, section 3.3.
    """
    if not 0 < max_edit_distance < 1:
        raise BadOption("max_edit_distance", max_edit_distance, "a number between 0 and 1, such as 0.3")
    check_workers(workers)
    keys_t, keys_s = token_keys(view_t, strip=True), token_keys(view_s, strip=True)
    blocks_t = distance_blocks(without_partner(keys_t, view_t, view_s), keys_s, match_digits=match_digits)
    blocks_s = distance_blocks(without_partner(keys_s, view_s, view_t), keys_t, match_digits=match_digits)
    find = partial(near_pairs, max_edit_distance=max_edit_distance, workers=workers)
    found = list(search_blocks([*blocks_t, *blocks_s], find, progress))
    pairs_t, pairs_s = concatenate_pairs(found[: len(blocks_t)]), concatenate_pairs(found[len(blocks_t) :])
    # Equal fractions give equal floats, so the index in the sorted distances is an exact rank.
    distances = np.unique(np.concatenate([pairs.edits / pairs.total for pairs in (pairs_t, pairs_s)]))
    blanks: dict[tuple[str, str], int] = {}
    t, s = (
        _TokenFacts.of(keys, view.vocab_size, blanks) for keys, view in ((keys_t, view_t), (keys_s, view_s))
    )
    return NeighbourTable(
        **pair_info(view_t, view_s),
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
        t_to_s=_rows(pairs_t, distances, t, s),
        s_to_t=_rows(pairs_s, distances, s, t),
    )


def check_workers(workers: int) -> None:
    """Raise BadOption for fewer than one worker."""
    if workers < 1:
        raise BadOption("workers", workers, "1 or more")


def without_partner(keys: Sequence[TokenKey], view: TokenizerView, other: TokenizerView) -> list[TokenKey]:
    """Return the keys whose ids have no exact partner on the other side."""
    partner = exact_partners(view, other)
    return [key for key in keys if partner[key.id] < 0]


@dataclass(frozen=True, slots=True, eq=False)
class _TokenFacts:
    """What ranks pairs at the same distance, by id; equal whitespace stripped from a token has equal codes."""

    data: list[bytes]
    initial: np.ndarray
    blanks: Int32[np.ndarray, " vocab"]

    @classmethod
    def of(cls, keys: Sequence[TokenKey], size: int, known: dict[tuple[str, str], int]) -> _TokenFacts:
        data, blanks = [b""] * size, np.zeros(size, np.int32)
        for key in keys:
            data[key.id] = key.data
            blanks[key.id] = known.setdefault(key.blanks, len(known))
        return cls(data, np.array([each[:1] for each in data]), blanks)


def _rows(
    pairs: NearPairs, distances: Float64[np.ndarray, " distances"], q: _TokenFacts, c: _TokenFacts
) -> Neighbours:
    distance = pairs.edits / pairs.total
    blanks_differ = q.blanks[pairs.query] != c.blanks[pairs.choice]
    rank = 4 * np.searchsorted(distances, distance) + 2 * blanks_differ + _neither_is_prefix(pairs, q, c)
    order = np.lexsort((pairs.choice, rank, pairs.query))
    return Neighbours(
        indptr=np.searchsorted(pairs.query[order], np.arange(len(q.data) + 1)).astype(np.int64),
        ids=pairs.choice[order].astype(np.int32),
        distance=distance[order].astype(np.float32),
        rank=rank[order].astype(np.int32),
    )


def _neither_is_prefix(pairs: NearPairs, q: _TokenFacts, c: _TokenFacts) -> Bool[np.ndarray, " pairs"]:
    """Mark the pairs in which neither token is a prefix of the other."""
    marked = np.ones(len(pairs.query), bool)
    for i in np.flatnonzero(q.initial[pairs.query] == c.initial[pairs.choice]).tolist():
        a, b = q.data[pairs.query[i]], c.data[pairs.choice[i]]
        marked[i] = not (a.startswith(b) or b.startswith(a))
    return marked
