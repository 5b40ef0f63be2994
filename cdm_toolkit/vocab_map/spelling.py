"""Spell the tokens of one vocabulary with the tokens of another: equal bytes, several tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int32

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import exact_partners, preferred_ids
from cdm_toolkit.vocab_map.spelling_trie import DEEPEST
from cdm_toolkit.vocab_map.types import NO_MATCH

LONGEST = 16
"""Tokens of a spelling that are kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Spellings:
    """The ids of both vocabularies, spelled with tokens of the other; −1 is padding, or an id without a spelling."""

    of_t: Int32[np.ndarray, "vocab_t longest"]
    """Student tokens of each teacher id; a single one where bytes or role are equal."""
    of_s: Int32[np.ndarray, "vocab_s deepest"]
    """Teacher tokens of each student id, as many as `spelling_trie` needs."""


def build_spellings(view_t: TokenizerView, view_s: TokenizerView, longest: int = LONGEST) -> Spellings:
    """Spell each side's ids with the other's, the teacher's up to `longest` tokens.

    An id with an exact partner is spelled by it; other special tokens have no spelling. Of two student ids with
    the same bytes, the preferred one is used for both (`preferred_ids`).
    """
    return Spellings(spelled(view_t, view_s, longest), spelled(view_s, view_t, DEEPEST + 1))


def spelled(view: TokenizerView, by: TokenizerView, longest: int) -> Int32[np.ndarray, "vocab longest"]:
    """Spell one side's ids with the other's, up to `longest` tokens; −1 fills up, or stands for no spelling.

    An id with an exact partner is spelled by it; other special tokens have no spelling.
    """
    partner = exact_partners(view, by)
    ids = np.full((view.vocab_size, longest), NO_MATCH, np.int32)
    ids[:, 0] = partner
    rest = [i for i, data in enumerate(view.token_bytes) if data and partner[i] == NO_MATCH]
    for token_id, tokens in zip(rest, spell(by, [view.literals[i] for i in rest]), strict=True):
        ids[token_id, : len(tokens)] = tokens[:longest]
    return ids


def spell(view: TokenizerView, pieces: Sequence[bytes]) -> list[list[int]]:
    """Spell byte strings exactly with a vocabulary's ordinary tokens; an empty list where that is impossible.

    A string of valid UTF-8 is encoded by the tokenizer, if the bytes of its tokens are those of the string. A dummy
    prefix that the tokenizer adds counts as part of these bytes, so with such a tokenizer this works only for
    strings that begin with the prefix. All other strings, such as parts of a character, are spelled by
    `fewest_tokens`.
    """
    ids, longest = preferred_ids(view), max((len(data) for data in view.token_bytes if data), default=0)
    return [
        own or fewest_tokens(data, ids, longest)
        for data, own in zip(pieces, _own_tokens(view, pieces), strict=True)
    ]


def _own_tokens(view: TokenizerView, pieces: Sequence[bytes]) -> list[list[int]]:
    """Encode each string with the tokenizer; an empty list where the tokens do not have its bytes."""
    texts = [_text(data.removeprefix(view.scheme.dummy_prefix)) for data in pieces]
    encodings = view.backend.encode_batch(texts, add_special_tokens=False)
    found: list[list[int]] = [encoding.ids for encoding in encodings]
    return [ids if _bytes_of(view, ids) == data else [] for ids, data in zip(found, pieces, strict=True)]


def _text(data: bytes) -> str:
    """Decode UTF-8; return an empty text, which has no tokens, for invalid bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _bytes_of(view: TokenizerView, ids: list[int]) -> bytes:
    """Join the bytes of ordinary tokens; special tokens have none, so strings that contain one do not match."""
    return b"".join(view.token_bytes[token_id] or b"" for token_id in ids)


def fewest_tokens(data: bytes, ids: Mapping[bytes, int], longest: int) -> list[int]:
    """Spell bytes with the fewest tokens; an empty list where that is impossible.

    Ties go to the longest first token, then the longest second token, and so on. `longest` is the length in
    bytes of the longest token.

    >>> fewest_tokens(b"abcd", {b"a": 0, b"ab": 1, b"abc": 2, b"bcd": 3, b"cd": 4}, 3)
    [1, 4]
    """
    never = len(data) + 1
    count, take = [never] * len(data) + [0], [0] * len(data)
    for at in range(len(data) - 1, -1, -1):
        for end in range(min(at + longest, len(data)), at, -1):
            if count[end] + 1 < count[at] and data[at:end] in ids:
                count[at], take[at] = count[end] + 1, end
    if count[0] == never:
        return []
    ends = [0]
    while ends[-1] < len(data):
        ends.append(take[ends[-1]])
    return [ids[data[start:end]] for start, end in pairwise(ends)]
