"""Reference implementation of `row_sources.py`, one new id at a time."""

from __future__ import annotations

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact_reference import exact_reference
from cdm_toolkit.vocab_map.row_sources import SourceKind
from cdm_toolkit.vocab_map.spelling_reference import spelling_reference


def row_sources_reference(
    view_old: TokenizerView, view_new: TokenizerView
) -> list[tuple[SourceKind, list[int]]]:
    """Return each new id's kind of source and its old ids."""
    exact = exact_reference(view_new, view_old)
    return [_source(view_old, view_new, new_id, exact.get(new_id)) for new_id in range(view_new.vocab_size)]


def _source(
    view_old: TokenizerView, view_new: TokenizerView, new_id: int, partner: int | None
) -> tuple[SourceKind, list[int]]:
    if (special := view_new.special.get(new_id)) is not None:
        alike = [token.id for token in view_old.special.values() if token.content == special.content]
        old_id = partner if partner is not None else min(alike, default=None)
        return (SourceKind.FRESH, []) if old_id is None else (SourceKind.BY_ROLE, [old_id])
    if partner is not None:
        return SourceKind.COPIED, [partner]
    data = view_new.token_bytes[new_id]
    spelling = spelling_reference(view_old, data) if data else []
    return (SourceKind.MEAN if spelling else SourceKind.FRESH), spelling
