"""Find where a tokenizer changes a text: normalization, dropped characters, unknown tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdm_toolkit.tokdiff.spans import TokenSpans


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes `[start, end)` of the text, and the bytes of the tokens there, which differ."""

    start: int
    end: int
    text: bytes
    spelled: bytes


def changes(spans: TokenSpans) -> list[Change]:
    """List the ranges of a text that its tokens do not reproduce: normalized, dropped or unknown.

    A range is as short as the token boundaries allow. Empty where the tokens have the bytes of the text, except
    for a dummy prefix.
    """
    changed = ~spans.exact & ~spans.special
    ranges = sorted(
        [*zip(spans.start[changed].tolist(), spans.end[changed].tolist(), strict=True), *_dropped(spans)]
    )
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and start < merged[-1][1]:
            start, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((start, end))
    found = [
        Change(start, end, spans.text_bytes[start:end], _spelled(spans, start, end)) for start, end in merged
    ]
    return [change for change in found if change.text != change.spelled]


def _spelled(spans: TokenSpans, start: int, end: int) -> bytes:
    """Join the bytes of the tokens inside a range."""
    inside = np.flatnonzero((spans.start >= start) & (spans.end <= end) & (spans.end > spans.start))
    return b"".join(spans.view.literals[token_id] for token_id in spans.ids[inside].tolist())


def _dropped(spans: TokenSpans) -> list[tuple[int, int]]:
    """List the ranges that no token covers."""
    reached = np.concatenate(([0], np.maximum.accumulate(spans.end, dtype=np.int64)))
    begins = np.concatenate((spans.start, [len(spans.text_bytes)]))
    gaps = np.flatnonzero(begins > reached)
    return [(int(reached[i]), int(begins[i])) for i in gaps]
