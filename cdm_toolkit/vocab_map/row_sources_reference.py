"""Reference implementation of `row_sources.py`, one new id at a time."""

from __future__ import annotations

from collections.abc import Mapping

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import preferred_ids
from cdm_toolkit.vocab_map.row_sources import SourceKind
from cdm_toolkit.vocab_map.spelling_reference import spelling_reference
from cdm_toolkit.vocab_map.static_reference import exact_reference


def row_sources_reference(
    view_old: TokenizerView, view_new: TokenizerView
) -> list[tuple[SourceKind, list[int]]]:
    """Return each new id's kind of source and its old ids."""
    exact = exact_reference(view_new, view_old)
    preferred = preferred_ids(view_new)
    return [_source(view_old, view_new, new_id, exact, preferred) for new_id in range(view_new.vocab_size)]


def _source(
    view_old: TokenizerView,
    view_new: TokenizerView,
    new_id: int,
    exact: Mapping[int, int],
    preferred: Mapping[bytes, int],
) -> tuple[SourceKind, list[int]]:
    partner = exact.get(new_id)
    if (special := view_new.special.get(new_id)) is not None:
        alike = [token.id for token in view_old.special.values() if token.content == special.content]
        old_id = partner if partner is not None else min(alike, default=None)
        return (SourceKind.FRESH, []) if old_id is None else (SourceKind.BY_ROLE, [old_id])
    data = view_new.token_bytes[new_id]
    if partner is not None:
        first = preferred.get(data or b"", new_id)
        taken = new_id != first and exact.get(first) == partner
        return (SourceKind.FRESH, []) if taken else (SourceKind.COPIED, [partner])
    spelling = spelling_reference(view_old, data) if data else []
    return (SourceKind.MEAN if spelling else SourceKind.FRESH), spelling
