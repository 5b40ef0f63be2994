"""Which rows of an old vocabulary's embedding the rows of a new vocabulary are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np
from jaxtyping import Int8, Int32, Int64

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import exact_partners, preferred_ids
from cdm_toolkit.vocab_map.record import NO_MATCH


class Rule(IntEnum):
    """Name what a new id's row is made of."""

    COPIED = 0
    """The row of the old id with the same bytes."""
    BY_ROLE = 1
    """The row of the old special token with the same role or, where none has, the same content."""
    MEAN = 2
    """The mean of the rows of the old tokens that spell its bytes."""
    FRESH = 3
    """Nothing: no old token plays its role, none spell its bytes, or it has none."""


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Count new ids by rule."""

    copied: int
    by_role: int
    mean: int
    fresh: int


@dataclass(frozen=True, slots=True, eq=False)
class RowSources:
    """Hold for each new id its `Rule` and the old ids that it names, in the order of the bytes, as CSR rows."""

    size_old: int
    rule: Int8[np.ndarray, " vocab_new"]
    indptr: Int64[np.ndarray, " bound"]
    ids: Int32[np.ndarray, " entries"]

    def row(self, new_id: int) -> list[int]:
        """Give the old ids of one new id."""
        found: list[int] = self.ids[self.indptr[new_id] : self.indptr[new_id + 1]].tolist()
        return found

    @property
    def counts(self) -> SourceCounts:
        """Count the new ids that each rule serves."""
        return SourceCounts(*np.bincount(self.rule, minlength=len(Rule)).tolist())


def row_sources(view_old: TokenizerView, view_new: TokenizerView) -> RowSources:
    """Find for each new id the old ids that its row is made of.

    Exact partners come first (`exact_partners`: equal bytes, and special tokens of equal role), then special
    tokens of equal content. The bytes of any other ordinary token are spelled by `spell`.
    """
    partner = _partners(view_old, view_new)
    rest = [i for i, data in enumerate(view_new.token_bytes) if data and partner[i] == NO_MATCH]
    spelled = dict(zip(rest, spell(view_old, [view_new.literals[i] for i in rest]), strict=True))
    rows = [
        [old] if old != NO_MATCH else spelled.get(new_id, []) for new_id, old in enumerate(partner.tolist())
    ]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    rule = np.full(len(rows), Rule.FRESH, np.int8)
    rule[lengths > 0] = Rule.MEAN
    rule[partner != NO_MATCH] = Rule.COPIED
    rule[view_new.is_special & (partner != NO_MATCH)] = Rule.BY_ROLE
    return RowSources(
        size_old=view_old.vocab_size,
        rule=rule,
        indptr=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        ids=np.array([old_id for row in rows for old_id in row], np.int32),
    )


def _partners(view_old: TokenizerView, view_new: TokenizerView) -> Int64[np.ndarray, " vocab_new"]:
    partner = exact_partners(view_new, view_old)
    by_content = {view_old.special[i].content: i for i in sorted(view_old.special, reverse=True)}
    for token in view_new.special.values():
        if partner[token.id] == NO_MATCH:
            partner[token.id] = by_content.get(token.content, NO_MATCH)
    return partner


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
