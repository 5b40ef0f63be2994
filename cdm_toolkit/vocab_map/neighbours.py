"""The neighbour table: for each id without an exact partner, all near ids on the other side.

`neighbours_reference.py` is the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from cdm_toolkit.errors import BadOption
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.edit_distance import Progress, near_pairs
from cdm_toolkit.vocab_map.exact import exact_partners
from cdm_toolkit.vocab_map.keys import TokenKey, token_keys
from cdm_toolkit.vocab_map.near import NearIds, blocks, joined, search
from cdm_toolkit.vocab_map.types import Neighbours, NeighbourTable, sides

DEFAULT_MAX_EDIT_DISTANCE = 0.3


def build_neighbours(
    view_t: TokenizerView,
    view_s: TokenizerView,
    *,
    max_edit_distance: float = DEFAULT_MAX_EDIT_DISTANCE,
    match_digits: bool = True,
    workers: int = 1,
    progress: Progress | None = None,
) -> NeighbourTable:
    """Find all pairs with Lev(a, b) / (|a| + |b|) < max_edit_distance where a has no exact partner, in both directions.

    Blanks and word marks at both ends are stripped first; a token of nothing else has no neighbours, nor has
    a special token. Lengths are characters, or bytes where either token is not whole characters. With
    `match_digits`, digits and operators must agree (`keys.guard`). `progress` gets (done, total). BadOption for
    max_edit_distance outside (0, 1) or workers below 1. Source: arXiv 2502.11104, section 3.3.
    """
    check_max_edit_distance(max_edit_distance)
    check_workers(workers)
    keys_t, keys_s = token_keys(view_t, strip=True), token_keys(view_s, strip=True)
    blocks_t = blocks(without_partner(keys_t, view_t, view_s), keys_s, match_digits=match_digits)
    blocks_s = blocks(without_partner(keys_s, view_s, view_t), keys_t, match_digits=match_digits)
    find = partial(near_pairs, max_edit_distance=max_edit_distance, workers=workers)
    found = list(search([*blocks_t, *blocks_s], find, progress))
    pairs_t, pairs_s = joined(found[: len(blocks_t)]), joined(found[len(blocks_t) :])

    blanks_t, blanks_s = _blanks(keys_t, keys_s, view_t.vocab_size, view_s.vocab_size)
    differ_t = blanks_t[pairs_t.query] != blanks_s[pairs_t.choice]
    differ_s = blanks_s[pairs_s.query] != blanks_t[pairs_s.choice]
    data_t, data_s = _data(keys_t, view_t.vocab_size), _data(keys_s, view_s.vocab_size)
    apart_t, apart_s = _apart(pairs_t, data_t, data_s), _apart(pairs_s, data_s, data_t)
    distance_t, distance_s = pairs_t.edits / pairs_t.total, pairs_s.edits / pairs_s.total
    # Equal fractions give equal floats, so equal distances get one place in this list of all distances.
    places = np.unique(np.concatenate([distance_t, distance_s]))
    rank_t = (4 * np.searchsorted(places, distance_t) + 2 * differ_t + apart_t).astype(np.int32)
    rank_s = (4 * np.searchsorted(places, distance_s) + 2 * differ_s + apart_s).astype(np.int32)
    return NeighbourTable(
        **sides(view_t, view_s),
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
        t_to_s=_rows(pairs_t, distance_t, rank_t, view_t.vocab_size),
        s_to_t=_rows(pairs_s, distance_s, rank_s, view_s.vocab_size),
    )


def check_max_edit_distance(max_edit_distance: float) -> None:
    """Refuse a threshold that keeps nothing or everything: BadOption outside (0, 1)."""
    if not 0 < max_edit_distance < 1:
        raise BadOption("max_edit_distance", max_edit_distance, "a number between 0 and 1, such as 0.3")


def check_workers(workers: int) -> None:
    """Refuse a number of workers that is none: BadOption below 1."""
    if workers < 1:
        raise BadOption("workers", workers, "1 or more")


def without_partner(keys: Sequence[TokenKey], view: TokenizerView, other: TokenizerView) -> list[TokenKey]:
    """Give the keys whose ids have no exact partner on the other side."""
    partner = exact_partners(view, other)
    return [key for key in keys if partner[key.id] < 0]


def _blanks(
    keys_t: Sequence[TokenKey], keys_s: Sequence[TokenKey], size_t: int, size_s: int
) -> tuple[Int32[np.ndarray, " vocab_t"], Int32[np.ndarray, " vocab_s"]]:
    """Number the blanks that were stripped from each id, equal numbers for equal blanks."""
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


def _apart(pairs: NearIds, data_q: list[bytes], data_c: list[bytes]) -> Bool[np.ndarray, " pairs"]:
    """Say of which pairs neither token begins with the other."""
    apart = np.ones(len(pairs.query), bool)
    initial_q, initial_c = (np.array([data[:1] for data in side]) for side in (data_q, data_c))
    for at in np.flatnonzero(initial_q[pairs.query] == initial_c[pairs.choice]).tolist():
        a, b = data_q[pairs.query[at]], data_c[pairs.choice[at]]
        apart[at] = not (a.startswith(b) or b.startswith(a))
    return apart


def _rows(
    pairs: NearIds,
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
