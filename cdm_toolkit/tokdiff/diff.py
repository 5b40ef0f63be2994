"""Compare two tokenizers: vocabularies, special tokens and byte schemes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.tokdiff.vocabulary import SpecialToken

LONGEST_LISTED = 10
"""Number of longest tokens listed for each tokenizer."""

IdPairs = Int32[np.ndarray, "_ 2"]


@dataclass(frozen=True, slots=True)
class TokenizerSummary:
    """Summary of one tokenizer, beside another."""

    view: TokenizerView
    without_bytes: int
    """Ids that are special or unused."""
    only_here: int
    """Ids whose bytes are not a token of the other tokenizer."""
    special_by_role: Mapping[str, tuple[SpecialToken, ...]]
    """Special tokens by primary role; those without one are not listed."""
    longest: tuple[int, ...]
    """Ids of the tokens with the most bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerDiff:
    """The difference between two tokenizers `a` and `b`."""

    a: TokenizerSummary
    b: TokenizerSummary
    shared: IdPairs
    """Ids with equal bytes, as (id of a, id of b), sorted."""
    moved: IdPairs
    """Those of `shared` whose two ids differ."""

    @property
    def same(self) -> bool:
        """Whether the fingerprints are equal."""
        return self.a.view.fingerprint == self.b.view.fingerprint

    @property
    def roles_of_one(self) -> tuple[str, ...]:
        """Roles for which only one tokenizer has a special token."""
        return tuple(sorted(set(self.a.special_by_role) ^ set(self.b.special_by_role)))


def diff(view_a: TokenizerView, view_b: TokenizerView) -> TokenizerDiff:
    """Compare the vocabularies, special tokens and schemes of two tokenizers."""
    shared = shared_ids(view_a, view_b)
    moved = shared[shared[:, 0] != shared[:, 1]]
    return TokenizerDiff(_summary(view_a, view_b), _summary(view_b, view_a), shared, moved)


def shared_ids(view_a: TokenizerView, view_b: TokenizerView) -> IdPairs:
    """Pair the ids with equal bytes; where there are several, in ascending order of id."""
    ids_a, ids_b = ids_by_bytes(view_a), ids_by_bytes(view_b)
    pairs = [
        pair
        for token in ids_a.keys() & ids_b.keys()
        for pair in zip(ids_a[token], ids_b[token], strict=False)
    ]
    return np.array(sorted(pairs), np.int32).reshape(-1, 2)


def ids_by_bytes(view: TokenizerView) -> dict[bytes, list[int]]:
    """Map token bytes to their ids, ascending; special and unused ids are left out."""
    ids: dict[bytes, list[int]] = {}
    for token_id, token in enumerate(view.token_bytes):
        if token is not None:
            ids.setdefault(token, []).append(token_id)
    return ids


def _summary(view: TokenizerView, other: TokenizerView) -> TokenizerSummary:
    tokens = [(token_id, token) for token_id, token in enumerate(view.token_bytes) if token is not None]
    theirs = set(other.token_bytes)
    by_role: dict[str, list[SpecialToken]] = {}
    for special in sorted(view.special.values(), key=lambda special: special.id):
        if special.role:
            by_role.setdefault(special.role, []).append(special)
    return TokenizerSummary(
        view=view,
        without_bytes=view.vocab_size - len(tokens),
        only_here=sum(token not in theirs for _, token in tokens),
        special_by_role={role: tuple(specials) for role, specials in by_role.items()},
        longest=tuple(
            token_id for token_id, _ in sorted(tokens, key=lambda item: -len(item[1]))[:LONGEST_LISTED]
        ),
    )
