"""Reference implementation of `neighbours.py` that tries every pair."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact_reference import exact_reference
from cdm_toolkit.vocab_map.keys import TokenKey, token_keys


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
