"""Edit distance between tokens, over characters where it can be and over bytes where it cannot.

Two tokens that are whole characters are compared character by character; where either is not (half a
character, say), both are compared byte by byte. A vocabulary therefore meets the other in up to three blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from cdm_toolkit.vocab_map.edit_distance import Pairs, Progress, Strings, pack
from cdm_toolkit.vocab_map.keys import TokenKey, guard_codes


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Hold tokens that meet in one unit; `tie` orders the choices by (length in bytes, id)."""

    query_ids: Int64[np.ndarray, " queries"]
    choice_ids: Int64[np.ndarray, " choices"]
    tie: Int32[np.ndarray, " choices"]
    queries: Strings
    choices: Strings


@dataclass(frozen=True, slots=True, eq=False)
class NearIds:
    """Hold pairs of ids with their distance in edits, the sum of lengths, and the choice's place in ties."""

    query: Int64[np.ndarray, " pairs"]
    choice: Int64[np.ndarray, " pairs"]
    edits: Int32[np.ndarray, " pairs"]
    total: Int32[np.ndarray, " pairs"]
    tie: Int32[np.ndarray, " pairs"]


def blocks(queries: Sequence[TokenKey], choices: Sequence[TokenKey], *, match_digits: bool) -> list[Block]:
    """Split a comparison by unit, so that each pair of tokens meets in exactly one block."""
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


def search(
    through: Sequence[Block],
    find: Callable[[Strings, Strings, Progress | None], Pairs],
    progress: Progress | None,
) -> Iterator[NearIds]:
    """Yield what `find` finds in each block, in ids; `progress` gets (queries done, queries in all)."""
    total, done = sum(len(block.query_ids) for block in through), 0
    for block in through:
        pairs = find(block.queries, block.choices, _part_of(progress, done, total))
        done += len(block.query_ids)
        yield NearIds(
            block.query_ids[pairs.query],
            block.choice_ids[pairs.choice],
            pairs.edits,
            pairs.total,
            block.tie[pairs.choice],
        )


def joined(parts: Sequence[NearIds]) -> NearIds:
    """Put pairs from several blocks together."""
    nothing = NearIds(*(np.zeros(0, np.int64),) * 2, *(np.zeros(0, np.int32),) * 3)
    columns = ("query", "choice", "edits", "total", "tie")
    return NearIds(
        *(np.concatenate([getattr(part, column) for part in (nothing, *parts)]) for column in columns)
    )


def _block(
    queries: list[TokenKey],
    choices: list[TokenKey],
    tie: Int32[np.ndarray, " choices"],
    *,
    match_digits: bool,
) -> Block:
    codes: dict[str, int] = {}
    guard_q = np.array(guard_codes(queries, codes, match_digits=match_digits), np.int32)
    guard_c = np.array(guard_codes(choices, codes, match_digits=match_digits), np.int32)
    texts_q = [key.text for key in queries if key.text is not None]
    texts_c = [key.text for key in choices if key.text is not None]
    if len(texts_q) == len(queries) and len(texts_c) == len(choices):
        packed = pack(texts_q, texts_c, (guard_q, guard_c), tie)
    else:
        packed = pack([key.data for key in queries], [key.data for key in choices], (guard_q, guard_c), tie)
    return Block(_ids(queries), _ids(choices), tie, *packed)


def _by_wholeness(keys: Sequence[TokenKey]) -> tuple[list[int], list[int]]:
    whole = [i for i, key in enumerate(keys) if key.text is not None]
    return whole, [i for i, key in enumerate(keys) if key.text is None]


def _ids(keys: Sequence[TokenKey]) -> Int64[np.ndarray, " keys"]:
    return np.array([key.id for key in keys], np.int64)


def _part_of(progress: Progress | None, done: int, total: int) -> Progress | None:
    return None if progress is None else lambda part, _: progress(done + part, total)
