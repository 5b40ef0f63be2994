"""The tokens of one vocabulary as a trie of how the other vocabulary spells them: which token is a sequence?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64

from cdm_toolkit.vocab_map.types import NO_MATCH

DEEPEST = 4
"""Most tokens of a spelling that is in a trie. Of SmolLM2's tokens 99 in 100 ids of GPT-2 and Mistral need no more,
of Qwen2, which has many ids for Chinese, 89."""
ROOT = 0


@dataclass(frozen=True, slots=True, eq=False)
class SpellingTrie:
    """Spellings of at least two tokens, as ways from node 0.

    `keys[i]`, ascending, is node × vocabulary + token of the edge that leads to node i + 1. `ends` is the id that is
    spelled by the way to each node, −1 for none.
    """

    keys: Int64[np.ndarray, " edge"]
    ends: Int64[np.ndarray, " node"]
    longest_prefix: Int64[np.ndarray, " vocab"]
    """For each id the one with the longest spelling that its own begins with, −1 without one."""


def build_spelling_trie(spellings: Int[np.ndarray, "vocab longest"], size: int) -> SpellingTrie:
    """Put the ids' spellings, by tokens of a vocabulary of `size`, into a trie; −1 fills a spelling up.

    Spellings of one token, and those as long as the table is wide, which may have been cut, are left out. Of two ids
    with one spelling the lower one is its end.
    """
    lengths = (spellings >= 0).sum(1)
    ids = np.flatnonzero((lengths > 1) & (lengths < spellings.shape[1]))
    longest_prefix = np.full(len(spellings), NO_MATCH, np.int64)
    keys: list[Int64[np.ndarray, " edge"]] = []
    ends = [np.full(1, NO_MATCH, np.int64)]
    at, count = np.full(len(ids), ROOT), 1  # the node that each id has come to, of `count` so far
    while len(ids):
        depth = len(keys)
        level, child = np.unique(at * size + spellings[ids, depth], return_inverse=True)
        is_end = lengths[ids] == depth + 1
        end = np.full(len(level), NO_MATCH, np.int64)
        end[child[is_end][::-1]] = ids[is_end][::-1]  # the first of several
        keys.append(level)
        ends.append(end)
        at, ids, child = count + child[~is_end], ids[~is_end], child[~is_end]
        longest_prefix[ids] = np.where(end[child] >= 0, end[child], longest_prefix[ids])
        count += len(level)
    return SpellingTrie(np.concatenate([*keys, np.zeros(0, np.int64)]), np.concatenate(ends), longest_prefix)
