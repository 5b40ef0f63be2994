"""Edit distance between tokens, over characters where both are valid UTF-8, else over bytes.

A token that is part of a multi-byte character is not valid UTF-8. The comparison of two vocabularies is therefore
split into up to three blocks, each in one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import numpy as np
from jaxtyping import Int32

from cdm_toolkit.vocab_map.edit_distance import NearPairs, PackedStrings, ProgressCallback, pack
from cdm_toolkit.vocab_map.keys import TokenKey

Block = tuple[PackedStrings, PackedStrings]
"""Queries and choices that are compared in one unit (characters or bytes), both named by id."""


def distance_blocks(
    queries: Sequence[TokenKey], choices: Sequence[TokenKey], *, match_digits: bool
) -> list[Block]:
    """Split a comparison by unit; each pair of tokens is in exactly one block.

    The lower `tie` is that of the choice with fewer bytes, then of the lower id.
    """
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
    token_blocks: Sequence[Block],
    find: Callable[[PackedStrings, PackedStrings, ProgressCallback | None], NearPairs],
    progress: ProgressCallback | None,
) -> Iterator[NearPairs]:
    """Run `find` on each block; `progress` gets (queries done, all queries)."""
    total, done = sum(len(queries.order) for queries, _ in token_blocks), 0
    for queries, choices in token_blocks:
        yield find(queries, choices, _part_of(progress, done, total))
        done += len(queries.order)


def concatenate_pairs(parts: Sequence[NearPairs]) -> NearPairs:
    """Concatenate the pairs of several blocks."""
    nothing = NearPairs(*(np.zeros(0, np.int64),) * 2, *(np.zeros(0, np.int32),) * 3)
    columns = [field.name for field in fields(NearPairs)]
    return NearPairs(
        *(np.concatenate([getattr(part, column) for part in (nothing, *parts)]) for column in columns)
    )


def _block(
    queries: list[TokenKey],
    choices: list[TokenKey],
    tie: Int32[np.ndarray, " choices"],
    *,
    match_digits: bool,
) -> Block:
    known: dict[str, int] = {}

    def codes(keys: list[TokenKey]) -> Int32[np.ndarray, " keys"]:
        """Encode what must match: equal strings have equal codes, all have 0 where nothing must."""
        texts = (key.must_match if match_digits else "" for key in keys)
        return np.array([known.setdefault(text, len(known)) for text in texts], np.int32)

    must_match = codes(queries), codes(choices)
    texts_q = [key.text for key in queries if key.text is not None]
    texts_c = [key.text for key in choices if key.text is not None]
    if len(texts_q) == len(queries) and len(texts_c) == len(choices):
        packed = pack(texts_q, texts_c, must_match, tie)
    else:
        packed = pack([key.data for key in queries], [key.data for key in choices], must_match, tie)
    return _named(packed[0], queries), _named(packed[1], choices)


def _named(packed: PackedStrings, keys: list[TokenKey]) -> PackedStrings:
    return packed._replace(order=np.array([key.id for key in keys], np.int64)[packed.order])


def _by_wholeness(keys: Sequence[TokenKey]) -> tuple[list[int], list[int]]:
    whole = [i for i, key in enumerate(keys) if key.text is not None]
    return whole, [i for i, key in enumerate(keys) if key.text is None]


def _part_of(progress: ProgressCallback | None, done: int, total: int) -> ProgressCallback | None:
    return None if progress is None else lambda part, _: progress(done + part, total)
