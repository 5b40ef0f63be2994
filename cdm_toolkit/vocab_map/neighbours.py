"""The neighbour table: for each id without an exact partner, all ids of the other side within an edit distance.

`neighbours_reference.py` is the definition in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from cdm_toolkit.errors import BadOption
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.edit_distance import ProgressCallback, near_pairs
from cdm_toolkit.vocab_map.exact import exact_partners
from cdm_toolkit.vocab_map.keys import TokenKey, token_keys
from cdm_toolkit.vocab_map.token_distances import (
    NearIdPairs,
    concatenate_pairs,
    distance_blocks,
    search_blocks,
)
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
    check_max_edit_distance(max_edit_distance)
    check_workers(workers)
    keys_t, keys_s = token_keys(view_t, strip=True), token_keys(view_s, strip=True)
    blocks_t = distance_blocks(without_partner(keys_t, view_t, view_s), keys_s, match_digits=match_digits)
    blocks_s = distance_blocks(without_partner(keys_s, view_s, view_t), keys_t, match_digits=match_digits)
    find = partial(near_pairs, max_edit_distance=max_edit_distance, workers=workers)
    found = list(search_blocks([*blocks_t, *blocks_s], find, progress))
    pairs_t, pairs_s = concatenate_pairs(found[: len(blocks_t)]), concatenate_pairs(found[len(blocks_t) :])

    blanks_t, blanks_s = _blanks(keys_t, keys_s, view_t.vocab_size, view_s.vocab_size)
    differ_t = blanks_t[pairs_t.query] != blanks_s[pairs_t.choice]
    differ_s = blanks_s[pairs_s.query] != blanks_t[pairs_s.choice]
    data_t, data_s = _data(keys_t, view_t.vocab_size), _data(keys_s, view_s.vocab_size)
    no_prefix_t, no_prefix_s = (
        _neither_is_prefix(pairs_t, data_t, data_s),
        _neither_is_prefix(pairs_s, data_s, data_t),
    )
    distance_t, distance_s = pairs_t.edits / pairs_t.total, pairs_s.edits / pairs_s.total
    # Equal fractions give equal floats, so the index in the sorted distances is an exact rank.
    distances = np.unique(np.concatenate([distance_t, distance_s]))
    rank_t = (4 * np.searchsorted(distances, distance_t) + 2 * differ_t + no_prefix_t).astype(np.int32)
    rank_s = (4 * np.searchsorted(distances, distance_s) + 2 * differ_s + no_prefix_s).astype(np.int32)
    return NeighbourTable(
        **pair_info(view_t, view_s),
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
        t_to_s=_rows(pairs_t, distance_t, rank_t, view_t.vocab_size),
        s_to_t=_rows(pairs_s, distance_s, rank_s, view_s.vocab_size),
    )


def check_max_edit_distance(max_edit_distance: float) -> None:
    """Raise BadOption for a threshold outside (0, 1)."""
    if not 0 < max_edit_distance < 1:
        raise BadOption("max_edit_distance", max_edit_distance, "a number between 0 and 1, such as 0.3")


def check_workers(workers: int) -> None:
    """Raise BadOption for fewer than one worker."""
    if workers < 1:
        raise BadOption("workers", workers, "1 or more")


def without_partner(keys: Sequence[TokenKey], view: TokenizerView, other: TokenizerView) -> list[TokenKey]:
    """Return the keys whose ids have no exact partner on the other side."""
    partner = exact_partners(view, other)
    return [key for key in keys if partner[key.id] < 0]


def _blanks(
    keys_t: Sequence[TokenKey], keys_s: Sequence[TokenKey], size_t: int, size_s: int
) -> tuple[Int32[np.ndarray, " vocab_t"], Int32[np.ndarray, " vocab_s"]]:
    """Return a code of the whitespace stripped from each id; equal whitespace has equal codes."""
    known: dict[tuple[str, str], int] = {}
    out = np.zeros(size_t, np.int32), np.zeros(size_s, np.int32)
    for codes, keys in zip(out, (keys_t, keys_s), strict=True):
        for key in keys:
            codes[key.id] = known.setdefault(key.blanks, len(known))
    return out


def _data(keys: Sequence[TokenKey], size: int) -> list[bytes]:
    data = [b""] * size
    for key in keys:
        data[key.id] = key.data
    return data


def _neither_is_prefix(
    pairs: NearIdPairs, data_q: list[bytes], data_c: list[bytes]
) -> Bool[np.ndarray, " pairs"]:
    """Mark the pairs in which neither token is a prefix of the other."""
    marked = np.ones(len(pairs.query), bool)
    initial_q, initial_c = (np.array([data[:1] for data in side]) for side in (data_q, data_c))
    for i in np.flatnonzero(initial_q[pairs.query] == initial_c[pairs.choice]).tolist():
        a, b = data_q[pairs.query[i]], data_c[pairs.choice[i]]
        marked[i] = not (a.startswith(b) or b.startswith(a))
    return marked


def _rows(
    pairs: NearIdPairs,
    distance: Float64[np.ndarray, " pairs"],
    rank: Int32[np.ndarray, " pairs"],
    size: int,
) -> Neighbours:
    order = np.lexsort((pairs.choice, rank, pairs.query))
    indptr: Int64[np.ndarray, " bound"] = np.searchsorted(pairs.query[order], np.arange(size + 1))
    return Neighbours(
        indptr=indptr.astype(np.int64),
        ids=pairs.choice[order].astype(np.int32),
        distance=distance[order].astype(np.float32),
        rank=rank[order],
    )
