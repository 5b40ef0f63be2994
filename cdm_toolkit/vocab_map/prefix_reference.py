"""Reference implementation of `prefix.py` that tries every student token."""

from __future__ import annotations

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import byte_pieces
from cdm_toolkit.vocab_map.exact_reference import exact_reference


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
