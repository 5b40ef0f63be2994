"""Reference implementation of `exact.py`, one teacher id at a time."""

from __future__ import annotations

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import byte_pieces


def exact_reference(view_t: TokenizerView, view_s: TokenizerView) -> dict[int, int]:
    """Map the teacher ids that have an exact partner."""
    return {
        token_id: partner
        for token_id in range(view_t.vocab_size)
        if (partner := _partner(view_t, view_s, token_id)) is not None
    }


def _partner(view_t: TokenizerView, view_s: TokenizerView, token_id: int) -> int | None:
    data = view_t.token_bytes[token_id]
    if data is not None:
        return _same_index(token_id, _with_bytes(view_t, data), _with_bytes(view_s, data))
    token = view_t.special.get(token_id)
    if token is None or token.role is None:
        return None
    partner = _same_index(token_id, _with_role(view_t, token.role), _with_role(view_s, token.role))
    if partner is not None:
        return partner
    return min((other.id for other in view_s.special.values() if other.roles & token.roles), default=None)


def _same_index(token_id: int, own: list[int], others: list[int]) -> int | None:
    index = own.index(token_id)
    return others[index if index < len(others) else 0] if others else None


def _with_bytes(view: TokenizerView, data: bytes) -> list[int]:
    pieces = byte_pieces(view.token_bytes)
    ids = [i for i, other in enumerate(view.token_bytes) if other == data]
    return [i for i in ids if i not in pieces] + [i for i in ids if i in pieces]


def _with_role(view: TokenizerView, role: str) -> list[int]:
    return sorted(token.id for token in view.special.values() if token.role == role)
