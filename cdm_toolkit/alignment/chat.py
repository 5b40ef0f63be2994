"""Align two renderings of one chat, each by its own template: contents by bytes, markers by role."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from cdm_toolkit.alignment.aligners import side_weights
from cdm_toolkit.alignment.groups import Alignment
from cdm_toolkit.alignment.sides import Side, require_same_text
from cdm_toolkit.errors import BadOption
from cdm_toolkit.tokdiff.spans import TokenSpans

Piece = tuple[int, int]


def align_segments(
    t: TokenSpans,
    pieces_t: Sequence[Piece],
    s: TokenSpans,
    pieces_s: Sequence[Piece],
    *,
    entropy_t: Float[np.ndarray, " time_t"] | None = None,
    entropy_s: Float[np.ndarray, " time_s"] | None = None,
) -> Alignment:
    """Align two texts over the pieces `[start, end)`, in bytes, that they have in common.

    The pieces are a chat's message contents; each must be the same bytes in both texts. They are aligned as
    `anchored` aligns them alone; what a piece's edge cuts in two belongs to the piece. Between them special
    tokens are matched by role, in order, and the texts of the two templates by DTW. Raises `BadOption` for
    pieces that are out of order, `DoesNotSpell` for pieces that differ.
    """
    from cdm_toolkit.alignment.anchored import align_anchored  # brings numba

    side_t, side_s = project(t, pieces_t), project(s, pieces_s)
    require_same_text(side_t, side_s)
    if side_t.parts != side_s.parts:
        raise BadOption("the pieces' ends", (side_t.parts, side_s.parts), "the same pieces of both texts")
    return align_anchored(side_t, side_s, side_weights(side_t, entropy_t), side_weights(side_s, entropy_s))


def project(spans: TokenSpans, pieces: Sequence[Piece]) -> Side:
    """Move the tokens of a text to where they are in its pieces, put end to end.

    What lies between two pieces is zero-width and a marker there. A token that reaches out of a piece keeps
    the part inside, and is not exact.
    """
    _require_ordered(pieces, len(spans.text_bytes))
    pieces = [(a, b) for a, b in pieces if a < b]
    opens, closes = (np.array([piece[edge] for piece in pieces], np.int64) for edge in (0, 1))
    ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(closes - opens)))
    start, end, width = spans.start, spans.end, spans.end - spans.start

    part = np.searchsorted(closes, start, "right")  # the first piece that ends after the token's start
    last = (
        np.searchsorted(opens, np.maximum(end, start + 1), "left") - 1
    )  # the last that starts before its end
    outside = last < part
    marker = outside | (spans.special & (width == 0))
    first, last = np.minimum(part, len(pieces) - 1), np.maximum(last, 0)
    if not len(pieces):
        inner_start, inner_end, inside = start * 0, start * 0, outside
    else:
        inner_start = ends[first] + np.maximum(start - opens[first], 0)
        inner_end = ends[last] + np.minimum(end, closes[last]) - opens[last]
        inside = (first == last) & (start >= opens[first]) & (end <= closes[last])
    return Side(
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
