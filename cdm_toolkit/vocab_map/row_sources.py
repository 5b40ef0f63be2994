"""Initialisation of embedding rows for a new vocabulary from the rows of an old one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import exact_partners, preferred_ids
from cdm_toolkit.vocab_map.spelling import spell
from cdm_toolkit.vocab_map.types import NO_MATCH


class SourceKind(IntEnum):
    """How a new id's embedding row is initialised."""

    COPIED = 0
    """The row of the old id with the same bytes."""
    BY_ROLE = 1
    """The row of the old special token with the same role or, where none has, the same content."""
    MEAN = 2
    """The mean of the rows of the old tokens that spell its bytes."""
    FRESH = 3
    """Not from old rows: no old token has its role, none spell its bytes, it has no bytes, or another new id with its
    bytes has the old row (Mistral's `<0x2D>` beside `-`), which it would share all predictions with."""
    OMP = 4
    """A combination of the rows of tokens that the old vocabulary shares with a donor's; `row_sources` gives none."""


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Number of new ids by kind of source."""

    copied: int
    by_role: int
    mean: int
    fresh: int
    omp: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class RowSources:
    """For each new id its `SourceKind` and its old ids, in the order of the bytes, as CSR rows."""

    size_old: int
    kind: Int8[np.ndarray, " vocab_new"]
    indptr: Int64[np.ndarray, " bound"]
    ids: Int32[np.ndarray, " entries"]

    def row(self, new_id: int) -> list[int]:
        """Return the old ids of one new id."""
        found: list[int] = self.ids[self.indptr[new_id] : self.indptr[new_id + 1]].tolist()
        return found

    @property
    def counts(self) -> SourceCounts:
        """Count the new ids of each kind."""
        return SourceCounts(*np.bincount(self.kind, minlength=len(SourceKind)).tolist())


def row_sources(view_old: TokenizerView, view_new: TokenizerView) -> RowSources:
    """Find the old ids whose rows initialise each new id's row.

    Exact partners come first (`exact_partners`: equal bytes, and special tokens of equal role), then special
    tokens of equal content. The bytes of any other ordinary token are spelled by `spell`. Of several new ids with
    the same bytes those that find no old row of their own are not made of old rows.
    """
    partner = partners(view_old, view_new)
    second = _second_of_their_bytes(view_new, partner)
    partner[second] = NO_MATCH
    unmatched = np.flatnonzero((partner == NO_MATCH) & ~second).tolist()
    rest = [i for i in unmatched if view_new.token_bytes[i]]
    spelled = dict(zip(rest, spell(view_old, [view_new.literals[i] for i in rest]), strict=True))
    rows = [
        [old] if old != NO_MATCH else spelled.get(new_id, []) for new_id, old in enumerate(partner.tolist())
    ]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    kind = np.full(len(rows), SourceKind.FRESH, np.int8)
    kind[lengths > 0] = SourceKind.MEAN
    kind[partner != NO_MATCH] = SourceKind.COPIED
    kind[view_new.is_special & (partner != NO_MATCH)] = SourceKind.BY_ROLE
    return RowSources(
        size_old=view_old.vocab_size,
        kind=kind,
        indptr=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        ids=np.array([old_id for row in rows for old_id in row], np.int32),
    )


def partners(view_old: TokenizerView, view_new: TokenizerView) -> Int64[np.ndarray, " vocab_new"]:
    """Return each new id's old id: that of `exact_partners`, else the special token of equal content, else NO_MATCH."""
    partner = exact_partners(view_new, view_old)
    by_content = {view_old.special[i].content: i for i in sorted(view_old.special, reverse=True)}
    for token in view_new.special.values():
        if partner[token.id] == NO_MATCH:
            partner[token.id] = by_content.get(token.content, NO_MATCH)
    return partner


def _second_of_their_bytes(
    view_new: TokenizerView, partner: Int64[np.ndarray, " vocab_new"]
) -> Bool[np.ndarray, " vocab_new"]:
    """Find the new ids whose bytes another new id spells first, where the old side has no id more for them."""
    first = preferred_ids(view_new)
    spelled_first = np.array(
        [i if data is None else first[data] for i, data in enumerate(view_new.token_bytes)]
    )
    of_others = spelled_first != np.arange(len(partner))
    found: Bool[np.ndarray, " vocab_new"] = of_others & (partner == partner[spelled_first])
    return found
