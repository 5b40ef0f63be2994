"""Static form of the contextual mapping: all student ids that a teacher id may be paired with."""

from __future__ import annotations

import numpy as np

from cdm_toolkit.vocab_map.types import NeighbourTable, VocabMap, check_tokenizers, pair_info_of


def build_contextual_map(exact: VocabMap, table: NeighbourTable) -> VocabMap:
    """Map each teacher id to its exact partner at weight 1, else to its neighbours, the nearest first.

    A neighbour's weight is proportional to max_edit_distance − distance. Which neighbour is used at a position is
    decided there (`contextual.py`). TokenizerMismatch where map and table are of different tokenizers.
    """
    check_tokenizers("the neighbour table", table, pair_info_of(exact))
    near = table.t_to_s
    counts = np.where(exact.matched, 1, np.diff(near.indptr))
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    ids, weights = np.empty(indptr[-1], np.int32), np.ones(indptr[-1], np.float64)
    first = indptr[:-1][exact.matched]
    ids[first] = exact.ids
    rest = np.ones(len(ids), bool)
    rest[first] = False
    ids[rest], weights[rest] = near.ids, table.max_edit_distance - near.distance.astype(np.float64)
    row = np.repeat(np.arange(len(counts)), counts)
    weights /= np.bincount(row, weights, len(counts))[row]
    return VocabMap(
        strategy="contextual",
        **pair_info_of(exact),
        indptr=indptr,
        ids=ids,
        weights=weights.astype(np.float32),
        max_edit_distance=table.max_edit_distance,
        match_digits=table.match_digits,
    )
