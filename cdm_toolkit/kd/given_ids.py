"""Rows of which one side's ids are given: what they spell, and what of it other sides learn."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from cdm_toolkit.kd.rows import GivenIds, Row
from cdm_toolkit.kd.tokenized_rows import END_ROLES, Turns
from cdm_toolkit.tokdiff.spans import TokenSpans, spell_ids
from cdm_toolkit.tokdiff.view import TokenizerView


def row_of_ids(
    number: int, view: TokenizerView, ids: Int32[np.ndarray, " time"], turns: Turns | None = None
) -> Row:
    """Make a row of the text that ids spell; their own side keeps the ids, the others encode the text.

    All of it is learned, or the tokens in `turns`. The special token after the text is kept where it ends a text or a
    turn, else the text counts as cut; so it does before the first byte that is no character. Special tokens within the
    text stay in the ids, and are no part of what the other sides read. UnknownTokenId.
    """
    spans = spell_ids(view, ids)
    text, after = _characters(spans)
    ends = after < len(ids) and bool(_roles(view, int(ids[after])) & END_ROLES)
    kept = ids[: after + ends].astype(np.int32)
    size = len(text.encode())
    if turns is None:
        first = int(np.argmax(~spans.special)) if after else 0
        whole = np.array([[max(first, 1), len(kept)]], np.int32)
        return _row(number, text, GivenIds(view.fingerprint, kept, whole, ((0, size),)), ends)
    turns = np.minimum(turns, len(kept)).astype(np.int32)
    turns = turns[turns[:, 0] < turns[:, 1]]
    pieces = tuple(
        (int(spans.start[first]), min(int(spans.end[end - 1]), size)) for first, end in turns.tolist()
    )
    ended = ends and bool(pieces) and int(turns[-1, 1]) == len(kept)
    return _row(number, text if pieces else "", GivenIds(view.fingerprint, kept, turns, pieces), ended)


def _row(number: int, text: str, given: GivenIds, ended: bool) -> Row:
    return Row(number, prompt="", completion=text, given=given, ended=ended)


def _characters(spans: TokenSpans) -> tuple[str, int]:
    """Give the whole characters from the beginning, and the index after the last token that spells any of them."""
    size = len(spans.text_bytes)
    try:
        text = spans.text_bytes.decode()
    except UnicodeDecodeError as error:
        starts = np.append((np.frombuffer(spans.text_bytes, np.uint8)[: error.start] & 0xC0) != 0x80, True)
        ends = spans.end[spans.end <= error.start]
        size = int(ends[starts[ends]].max(initial=0))
        text = spans.text_bytes[:size].decode()
    spelling = np.flatnonzero((spans.end <= size) & ~spans.special)
    return text, int(spelling[-1]) + 1 if len(spelling) else 0


def _roles(view: TokenizerView, token_id: int) -> frozenset[str]:
    return view.special[token_id].roles if token_id in view.special else frozenset()
