"""Where a tokenizer does not keep the text that it is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdm_toolkit.tokdiff.spans import TokenSpans


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes `[start, end)` of the text, and what the tokens that stand there spell instead."""

    start: int
    end: int
    text: bytes
    spelled: bytes


def changes(spans: TokenSpans) -> list[Change]:
    """List the stretches of a text that its tokens do not spell: changed, dropped or unknown.

    A stretch is as short as the tokens allow. Empty where the tokens spell the text, a dummy prefix apart.
    """
    changed = ~spans.exact & ~spans.special
    stretches = sorted(
        [*zip(spans.start[changed].tolist(), spans.end[changed].tolist(), strict=True), *_dropped(spans)]
    )
    merged: list[tuple[int, int]] = []
    for start, end in stretches:
        if merged and start < merged[-1][1]:
            start, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((start, end))
    found = [
        Change(start, end, spans.text_bytes[start:end], _spelled(spans, start, end)) for start, end in merged
    ]
    return [change for change in found if change.text != change.spelled]


def _spelled(spans: TokenSpans, start: int, end: int) -> bytes:
    """Join the bytes of the tokens that lie in a stretch."""
    inside = np.flatnonzero((spans.start >= start) & (spans.end <= end) & (spans.end > spans.start))
    return b"".join(spans.view.literals[token_id] for token_id in spans.ids[inside].tolist())


def _dropped(spans: TokenSpans) -> list[tuple[int, int]]:
    """List the stretches that no token covers."""
    reached = np.concatenate(([0], np.maximum.accumulate(spans.end, dtype=np.int64)))
    begins = np.concatenate((spans.start, [len(spans.text_bytes)]))
    gaps = np.flatnonzero(begins > reached)
    return [(int(reached[i]), int(begins[i])) for i in gaps]
