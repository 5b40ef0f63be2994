"""How two tokenizers differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from cdm_toolkit.tokdiff.token_bytes import Scheme
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.tokdiff.vocabulary import SpecialToken

LONGEST = 10
"""Longest tokens that are listed of each side."""

Pairs = Int32[np.ndarray, "pair 2"]
MovedPairs = Int32[np.ndarray, "moved 2"]


@dataclass(frozen=True, slots=True)
class Side:
    """Sum up one tokenizer."""

    name: str
    fingerprint: str
    size: int
    family: str
    scheme: Scheme
    without_bytes: int
    """Ids that are special or unused."""
    only_here: int
    """Ids whose bytes are no token of the other."""
    special_by_role: Mapping[str, tuple[SpecialToken, ...]]
    """Special tokens by primary role; those without one are not listed."""
    longest: tuple[int, ...]
    """Ids of the tokens with the most bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerDiff:
    """Compare two tokenizers: `a` and `b`."""

    a: Side
    b: Side
    shared: Pairs
    """Ids with the same bytes, a's and b's, by a's id."""
    moved: MovedPairs
    """Those of `shared` whose number differs."""

    @property
    def same(self) -> bool:
        """Say whether the two cannot be told apart."""
        return self.a.fingerprint == self.b.fingerprint

    @property
    def roles_of_one(self) -> tuple[str, ...]:
        """List the roles that only one side has a special token for."""
        return tuple(sorted(set(self.a.special_by_role) ^ set(self.b.special_by_role)))


def diff(view_a: TokenizerView, view_b: TokenizerView) -> TokenizerDiff:
    """Compare the vocabularies, special tokens and schemes of two tokenizers."""
    shared = shared_ids(view_a, view_b)
    moved = shared[shared[:, 0] != shared[:, 1]]
    return TokenizerDiff(_side(view_a, view_b), _side(view_b, view_a), shared, moved)


def shared_ids(view_a: TokenizerView, view_b: TokenizerView) -> Pairs:
    """Pair the ids that stand for the same bytes; where several do, the lowest with the lowest, and so on."""
    ids_a, ids_b = ids_by_bytes(view_a), ids_by_bytes(view_b)
    pairs = [
        pair
        for token in ids_a.keys() & ids_b.keys()
        for pair in zip(ids_a[token], ids_b[token], strict=False)
    ]
    return np.array(sorted(pairs), np.int32).reshape(-1, 2)


def ids_by_bytes(view: TokenizerView) -> dict[bytes, list[int]]:
    """List the ids of each token's bytes, ascending; special and unused ids are left out."""
    ids: dict[bytes, list[int]] = {}
    for token_id, token in enumerate(view.token_bytes):
        if token is not None:
            ids.setdefault(token, []).append(token_id)
    return ids


def _side(view: TokenizerView, other: TokenizerView) -> Side:
    tokens = [(token_id, token) for token_id, token in enumerate(view.token_bytes) if token is not None]
    theirs = set(other.token_bytes)
    by_role: dict[str, list[SpecialToken]] = {}
    for special in sorted(view.special.values(), key=lambda special: special.id):
        if special.role:
            by_role.setdefault(special.role, []).append(special)
    return Side(
        name=view.name,
        fingerprint=view.fingerprint,
        size=view.vocab_size,
        family=view.family,
        scheme=view.scheme,
        without_bytes=view.vocab_size - len(tokens),
        only_here=sum(token not in theirs for _, token in tokens),
        special_by_role={role: tuple(specials) for role, specials in by_role.items()},
        longest=tuple(token_id for token_id, _ in sorted(tokens, key=lambda item: -len(item[1]))[:LONGEST]),
    )
