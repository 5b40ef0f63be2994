"""How one vocabulary's tokens are spelled by the tokens of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int32

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import exact_partners, preferred_ids
from cdm_toolkit.vocab_map.types import NO_MATCH

LONGEST = 16
"""Tokens of a spelling that are looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class Spellings:
    """Hold each id of both vocabularies in the tokens of the other side; −1 fills up, and is an id that has none."""

    of_t: Int32[np.ndarray, "vocab_t longest"]
    """Student tokens of each teacher id; one where the bytes or the role are the same."""
    of_s: Int32[np.ndarray, " vocab_s"]
    """The first teacher token of each student id."""


def build_spellings(view_t: TokenizerView, view_s: TokenizerView, longest: int = LONGEST) -> Spellings:
    """Spell each side's ids with the other's, up to `longest` tokens: exact partners by one, special tokens not.

    Of two student ids with the same bytes the preferred one speaks for both (`preferred_ids`).
    """
    first = _spelled(view_s, view_t, 1)[:, 0]
    return Spellings(_spelled(view_t, view_s, longest), first)


def _spelled(view: TokenizerView, by: TokenizerView, longest: int) -> Int32[np.ndarray, "vocab longest"]:
    partner = exact_partners(view, by)
    ids = np.full((view.vocab_size, longest), NO_MATCH, np.int32)
    ids[:, 0] = partner
    rest = [i for i, data in enumerate(view.token_bytes) if data and partner[i] == NO_MATCH]
    for token_id, tokens in zip(rest, spell(by, [view.literals[i] for i in rest]), strict=True):
        ids[token_id, : len(tokens)] = tokens[:longest]
    return ids


def spell(view: TokenizerView, pieces: Sequence[bytes]) -> list[list[int]]:
    """Spell byte strings exactly with a vocabulary's ordinary tokens; an empty list where that cannot be.

    A string that is UTF-8 is spelled by the tokens that the tokenizer itself makes of it, where their bytes
    are those of the string. A dummy prefix that the tokenizer puts before every text is one of the bytes: a
    tokenizer that has one makes nothing exact of a string that does not begin with it. Whatever is left, half
    characters among it, is spelled by `fewest_tokens`.
    """
    ids, longest = preferred_ids(view), max((len(data) for data in view.token_bytes if data), default=0)
    return [
        own or fewest_tokens(data, ids, longest)
        for data, own in zip(pieces, _own_tokens(view, pieces), strict=True)
    ]


def _own_tokens(view: TokenizerView, pieces: Sequence[bytes]) -> list[list[int]]:
    """Give the tokenizer's own tokens of each string, an empty list where they do not spell its bytes."""
    texts = [_text(data.removeprefix(view.scheme.dummy_prefix)) for data in pieces]
    encodings = view.backend.encode_batch(texts, add_special_tokens=False)
    found: list[list[int]] = [encoding.ids for encoding in encodings]
    return [ids if _bytes_of(view, ids) == data else [] for ids, data in zip(found, pieces, strict=True)]


def _text(data: bytes) -> str:
    """Decode UTF-8; an empty text, which no token spells, where it is none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _bytes_of(view: TokenizerView, ids: list[int]) -> bytes:
    """Join the bytes of ordinary tokens; special ones add none, so that what they stood for is missing."""
    return b"".join(view.token_bytes[token_id] or b"" for token_id in ids)


def fewest_tokens(data: bytes, ids: Mapping[bytes, int], longest: int) -> list[int]:
    """Spell bytes with the fewest tokens, an empty list where none do.

    Of several ways with equally few the one whose first token is longest, then its second, and so on.
    `longest` is the length of the longest token.

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
