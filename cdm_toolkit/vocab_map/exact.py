"""Exact partners: tokens with equal bytes, and special tokens with equal roles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.tokdiff.vocabulary import SpecialToken
from cdm_toolkit.vocab_map.types import NO_MATCH, VocabMap, pair_info, single_match_map

Key = TypeVar("Key", bound=Hashable)


def build_exact(view_t: TokenizerView, view_s: TokenizerView) -> VocabMap:
    """Map each teacher id to the student id of the same bytes or, for a special token, the same role.

    Several ids of one side may have the same bytes (SentencePiece's `A` and its byte piece `<0x41>`): the k-th
    of them maps to the k-th on the other side, or to the first where that side has fewer. They are in order of
    id, byte pieces last, because tokenizers use byte pieces only as a fallback. So a tokenizer maps to itself by
    identity. Special tokens are paired the same way by their first role; one without a partner then maps to the
    first student token that shares any of its roles.
    """
    return single_match_map("exact", pair_info(view_t, view_s), exact_partners(view_t, view_s))


def exact_partners(view_t: TokenizerView, view_s: TokenizerView) -> Int64[np.ndarray, " vocab_t"]:
    """Return each teacher id's exact partner, −1 where it has none."""
    partner = np.full(view_t.vocab_size, NO_MATCH, np.int64)
    for teacher_id, student_id in chain(
        _paired(_by_bytes(view_t.token_bytes), _by_bytes(view_s.token_bytes)),
        _paired(_by_role(view_t), _by_role(view_s)),
    ):
        partner[teacher_id] = student_id
    by_role: dict[str, int] = {}
    for token_id in sorted(view_s.special, reverse=True):
        by_role.update(dict.fromkeys(_roles(view_s.special[token_id]), token_id))
    for token in view_t.special.values():
        if partner[token.id] == NO_MATCH:
            partner[token.id] = min(
                (by_role[role] for role in _roles(token) if role in by_role), default=NO_MATCH
            )
    return partner


def preferred_ids(view: TokenizerView) -> dict[bytes, int]:
    """Return the preferred id of each byte string: the lowest, byte pieces only where there is no other."""
    return {data: ids[0] for data, ids in _by_bytes(view.token_bytes).items()}


def _paired(teacher: Mapping[Key, list[int]], student: Mapping[Key, list[int]]) -> Iterable[tuple[int, int]]:
    for key, ids in teacher.items():
        others = student.get(key, [])
        for k, teacher_id in enumerate(ids):
            if others:
                yield teacher_id, others[k if k < len(others) else 0]


def _by_bytes(token_bytes: Sequence[bytes | None]) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = defaultdict(list)
    last = byte_pieces(token_bytes)
    for token_id in chain(range(last.start), range(last.stop, len(token_bytes)), last):
        data = token_bytes[token_id]
        if data is not None:
            found[data].append(token_id)
    return found


def byte_pieces(token_bytes: Sequence[bytes | None]) -> range:
    """Find the 256 consecutive ids that spell the bytes 0 to 255 in order: SentencePiece's byte pieces."""
    for first in range(len(token_bytes) - 255):
        if token_bytes[first] == b"\0" and all(token_bytes[first + i] == bytes([i]) for i in range(256)):
            return range(first, first + 256)
    return range(0)


def _by_role(view: TokenizerView) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for token_id in sorted(view.special):
        role = view.special[token_id].role
        if role is not None:
            found[role].append(token_id)
    return found


def _roles(token: SpecialToken) -> frozenset[str]:
    return token.roles | ({token.role} if token.role is not None else frozenset())
