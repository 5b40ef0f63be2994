"""Reference implementations of `exact.py`, `prefix.py`, `neighbours.py` and `min_ed.py`: every pair of ids is tried."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import byte_pieces
from cdm_toolkit.vocab_map.keys import TokenKey, token_keys


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


def prefix_reference(view_t: TokenizerView, view_s: TokenizerView) -> dict[int, int]:
    """Return the match of each teacher id that has one."""
    best = exact_reference(view_t, view_s)
    last = byte_pieces(view_s.token_bytes)
    for token_id, data in enumerate(view_t.token_bytes):
        if data is not None and token_id not in best:
            choices = [
                (-len(other), i in last, i)
                for i, other in enumerate(view_s.token_bytes)
                if other and data.startswith(other)
            ]
            if choices:
                best[token_id] = min(choices)[2]
    return best


def edits_and_lengths(a: TokenKey, b: TokenKey) -> tuple[int, int, int]:
    """Return Lev(a, b), |a| and |b| in characters, or in bytes where either is not valid UTF-8."""
    if a.text is not None and b.text is not None:
        return Levenshtein.distance(a.text, b.text), len(a.text), len(b.text)
    return Levenshtein.distance(a.data, b.data), len(a.data), len(b.data)


def distance(a: TokenKey, b: TokenKey) -> float:
    """Return Lev(a, b) / (|a| + |b|)."""
    edits, length_a, length_b = edits_and_lengths(a, b)
    return edits / (length_a + length_b)


def neither_is_prefix(a: TokenKey, b: TokenKey) -> bool:
    """Check that neither token is a prefix of the other."""
    return not (a.data.startswith(b.data) or b.data.startswith(a.data))


def neighbours_reference(
    view_t: TokenizerView, view_s: TokenizerView, *, max_edit_distance: float, match_digits: bool
) -> dict[int, list[tuple[float, bool, bool, int]]]:
    """Return the neighbours of each teacher id as (distance, blanks differ, neither is a prefix, student id).

    Nearest first. Swap the views for the other direction.
    """
    exact = exact_reference(view_t, view_s)
    students = token_keys(view_s, strip=True)
    table: dict[int, list[tuple[float, bool, bool, int]]] = {}
    for key in token_keys(view_t, strip=True):
        if key.id not in exact:
            near = sorted(
                (distance(key, other), key.blanks != other.blanks, neither_is_prefix(key, other), other.id)
                for other in students
                if distance(key, other) < max_edit_distance
                and (not match_digits or key.must_match == other.must_match)
            )
            if near:
                table[key.id] = near
    return table


def min_ed_reference(view_t: TokenizerView, view_s: TokenizerView, *, match_digits: bool) -> dict[int, int]:
    """Return the match of each teacher id that has one."""
    best = exact_reference(view_t, view_s)
    students = token_keys(view_s, strip=False)
    for key in token_keys(view_t, strip=False):
        if key.id not in best:
            choices = [
                (distance(key, other), len(other.data), other.id)
                for other in students
                if _something_in_common(key, other)
                and (not match_digits or key.must_match == other.must_match)
            ]
            if choices:
                best[key.id] = min(choices)[2]
    return best


def _something_in_common(a: TokenKey, b: TokenKey) -> bool:
    edits, length_a, length_b = edits_and_lengths(a, b)
    return edits < max(length_a, length_b)
