"""Edit distance between tokens, over characters where both are valid UTF-8, else over bytes.

A token that is part of a multi-byte character is not valid UTF-8. The comparison of two vocabularies is therefore
split into up to three blocks, each in one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from cdm_toolkit.vocab_map.edit_distance import NearPairs, PackedStrings, ProgressCallback, pack
from cdm_toolkit.vocab_map.keys import TokenKey, must_match_codes


@dataclass(frozen=True, slots=True, eq=False)
class DistanceBlock:
    """Tokens that are compared in one unit (characters or bytes); `tie` orders choices by (length in bytes, id)."""

    query_ids: Int64[np.ndarray, " queries"]
    choice_ids: Int64[np.ndarray, " choices"]
    tie: Int32[np.ndarray, " choices"]
    queries: PackedStrings
    choices: PackedStrings


@dataclass(frozen=True, slots=True, eq=False)
class NearIdPairs:
    """Pairs of ids with the number of edits, the sum of lengths, and the choice's rank in ties."""

    query: Int64[np.ndarray, " pairs"]
    choice: Int64[np.ndarray, " pairs"]
    edits: Int32[np.ndarray, " pairs"]
    total: Int32[np.ndarray, " pairs"]
    tie: Int32[np.ndarray, " pairs"]


def distance_blocks(
    queries: Sequence[TokenKey], choices: Sequence[TokenKey], *, match_digits: bool
) -> list[DistanceBlock]:
    """Split a comparison by unit; each pair of tokens is in exactly one block."""
    by_tie = sorted(range(len(choices)), key=lambda i: (len(choices[i].data), choices[i].id))
    tie = np.empty(len(choices), np.int32)
    tie[by_tie] = np.arange(len(choices))
    whole_q, part_q = _by_wholeness(queries)
    whole_c, part_c = _by_wholeness(choices)
    splits = ((whole_q, whole_c), (whole_q, part_c), (part_q, [*whole_c, *part_c]))
    return [
        _block([queries[i] for i in q], [choices[i] for i in c], tie[c], match_digits=match_digits)
        for q, c in splits
        if q and c
    ]


def search_blocks(
    token_blocks: Sequence[DistanceBlock],
    find: Callable[[PackedStrings, PackedStrings, ProgressCallback | None], NearPairs],
    progress: ProgressCallback | None,
) -> Iterator[NearIdPairs]:
    """Run `find` on each block and yield its pairs as ids; `progress` gets (queries done, all queries)."""
    total, done = sum(len(block.query_ids) for block in token_blocks), 0
    for block in token_blocks:
        pairs = find(block.queries, block.choices, _part_of(progress, done, total))
        done += len(block.query_ids)
        yield NearIdPairs(
            block.query_ids[pairs.query],
            block.choice_ids[pairs.choice],
            pairs.edits,
            pairs.total,
            block.tie[pairs.choice],
        )


def concatenate_pairs(parts: Sequence[NearIdPairs]) -> NearIdPairs:
    """Concatenate the pairs of several blocks."""
    nothing = NearIdPairs(*(np.zeros(0, np.int64),) * 2, *(np.zeros(0, np.int32),) * 3)
    columns = ("query", "choice", "edits", "total", "tie")
    return NearIdPairs(
        *(np.concatenate([getattr(part, column) for part in (nothing, *parts)]) for column in columns)
    )


def _block(
    queries: list[TokenKey],
    choices: list[TokenKey],
    tie: Int32[np.ndarray, " choices"],
    *,
    match_digits: bool,
) -> DistanceBlock:
    codes: dict[str, int] = {}
    must_match_q = np.array(must_match_codes(queries, codes, match_digits=match_digits), np.int32)
    must_match_c = np.array(must_match_codes(choices, codes, match_digits=match_digits), np.int32)
    texts_q = [key.text for key in queries if key.text is not None]
    texts_c = [key.text for key in choices if key.text is not None]
    if len(texts_q) == len(queries) and len(texts_c) == len(choices):
        packed = pack(texts_q, texts_c, (must_match_q, must_match_c), tie)
    else:
        packed = pack(
            [key.data for key in queries], [key.data for key in choices], (must_match_q, must_match_c), tie
        )
    return DistanceBlock(_ids(queries), _ids(choices), tie, *packed)


def _by_wholeness(keys: Sequence[TokenKey]) -> tuple[list[int], list[int]]:
    whole = [i for i, key in enumerate(keys) if key.text is not None]
    return whole, [i for i, key in enumerate(keys) if key.text is None]


def _ids(keys: Sequence[TokenKey]) -> Int64[np.ndarray, " keys"]:
    return np.array([key.id for key in keys], np.int64)


def _part_of(progress: ProgressCallback | None, done: int, total: int) -> ProgressCallback | None:
    return None if progress is None else lambda part, _: progress(done + part, total)
