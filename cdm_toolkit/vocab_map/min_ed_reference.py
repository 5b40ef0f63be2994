"""Reference implementation of `min_ed.py` that tries every student token."""

from __future__ import annotations

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact_reference import exact_reference
from cdm_toolkit.vocab_map.keys import TokenKey, token_keys
from cdm_toolkit.vocab_map.neighbours_reference import distance, edits_and_lengths


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
