"""Align two renderings of one chat, each by its own chat template.

Message contents are aligned by bytes, special tokens by role.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdm_toolkit.alignment.entropy import uniform_weights
from cdm_toolkit.alignment.groups import Alignment
from cdm_toolkit.alignment.sides import AlignmentSide, require_same_text
from cdm_toolkit.errors import BadOption
from cdm_toolkit.tokdiff.spans import TokenSpans

Piece = tuple[int, int]


def align_segments(
    t: TokenSpans,
    pieces_t: Sequence[Piece],
    s: TokenSpans,
    pieces_s: Sequence[Piece],
) -> Alignment:
    """Align two texts that share the given pieces, byte ranges `[start, end)` in each text.

    The pieces are a chat's message contents; each must have the same bytes in both texts. Each piece is
    aligned as `anchored` would align it alone; a token that spans the edge of a piece counts as part of it.
    Between pieces, special tokens are matched by role, in order, and the template texts by DTW. Raises
    `BadOption` for pieces that are out of order, `DoesNotSpell` for pieces that differ.
    """
    from cdm_toolkit.alignment.anchored import align_anchored  # loads numba

    side_t, side_s = project(t, pieces_t), project(s, pieces_s)
    require_same_text(side_t, side_s)
    if side_t.parts != side_s.parts:
        raise BadOption("the pieces' ends", (side_t.parts, side_s.parts), "the same pieces of both texts")
    return align_anchored(side_t, side_s, uniform_weights(len(t)), uniform_weights(len(s)))


def project(spans: TokenSpans, pieces: Sequence[Piece]) -> AlignmentSide:
    """Map the token spans of a text to byte offsets in its concatenated pieces.

    A token between two pieces becomes a zero-width marker at their boundary. A token that extends beyond a
    piece keeps only the part inside it, and is not exact.
    """
    _require_ordered(pieces, len(spans.text_bytes))
    pieces = [(a, b) for a, b in pieces if a < b]
    opens, closes = (np.array([piece[edge] for piece in pieces], np.int64) for edge in (0, 1))
    ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(closes - opens)))
    start, end, width = spans.start, spans.end, spans.end - spans.start

    # part: the first piece that ends after the token's start; last: the last that starts before its end
    part = np.searchsorted(closes, start, "right")
    last = np.searchsorted(opens, np.maximum(end, start + 1), "left") - 1
    outside = last < part
    marker = outside | (spans.special & (width == 0))
    first, last = np.minimum(part, len(pieces) - 1), np.maximum(last, 0)
    if not len(pieces):
        inner_start, inner_end, inside = start * 0, start * 0, outside
    else:
        inner_start = ends[first] + np.maximum(start - opens[first], 0)
        inner_end = ends[last] + np.minimum(end, closes[last]) - opens[last]
        inside = (first == last) & (start >= opens[first]) & (end <= closes[last])
    return AlignmentSide(
        view=spans.view,
        text=b"".join(spans.text_bytes[a:b] for a, b in pieces),
        ids=spans.ids,
        start=np.where(outside, ends[part], inner_start),
        end=np.where(outside, ends[part], inner_end),
        special=spans.special,
        exact=spans.exact & inside & ~marker,
        marker=marker,
        part=part,
        parts=tuple(ends[1:].tolist()) or (0,),
    )


def _require_ordered(pieces: Sequence[Piece], size: int) -> None:
    at = 0
    for start, end in pieces:
        if not at <= start <= end <= size:
            raise BadOption("a piece of the text", (start, end), f"bytes from {at} to {size}, in order")
        at = end
