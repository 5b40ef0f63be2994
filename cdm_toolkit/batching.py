"""Which items a model reads together, and how they are laid out for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int, Int64

Padding = Literal["right", "left"]
TOKENS_AT_ONCE = 8192
"""Places of a batch, padding counted, where no number of items is asked for."""
LOGITS_AT_ONCE = 2**27
"""Numbers that the logits of a batch may have where all of its places are scored: half a GiB in float32."""


def scored_places(vocabulary: int) -> int:
    """Count the places of a batch whose logits are all looked at.

    >>> scored_places(700), scored_places(151_936)
    (8192, 883)
    """
    return max(1, min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary))


def batches(lengths: Sequence[int], size: int | None = None, *, tokens: int | None = None) -> list[list[int]]:
    """Put items of like length together, the longest first: at most `size` a batch, and as many as `tokens` allow.

    Without either, `TOKENS_AT_ONCE` bounds them. They depend on nothing but the lengths, so that a run that goes
    on makes the batches of an unbroken one.

    >>> batches([5, 1, 9, 2], tokens=10)
    [[2], [0, 3], [1]]
    >>> batches([5, 1, 9, 2], 3)
    [[2, 0, 3], [1]]
    >>> batches([5, 1, 9, 2], 1, tokens=10)
    [[2], [0], [3], [1]]
    """
    if size is None and tokens is None:
        tokens = TOKENS_AT_ONCE
    made: list[list[int]] = []
    room = 0
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if not room:
            room = len(lengths) if size is None else size
            if tokens is not None:
                room = min(room, max(1, tokens // max(1, lengths[place])))
            made.append([])
        made[-1].append(place)
        room -= 1
    return made


def padded(
    sequences: Sequence[Sequence[int] | Int[np.ndarray, " _"]], pad: int = 0, padding: Padding = "right"
) -> tuple[Int64[np.ndarray, "batch time"], Int64[np.ndarray, "batch time"], Int64[np.ndarray, " batch"]]:
    """Pad sequences to one length; gives ids, mask, and where each sequence begins in batch × time.

    >>> ids, mask, starts = padded([[5, 6, 7], [8]], padding="left")
    >>> ids.tolist(), mask.tolist(), starts.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]], [0, 5])
    """
    lengths = np.array([len(ids) for ids in sequences])
    time = int(lengths.max())
    places = np.arange(time)
    offsets = time - lengths if padding == "left" else np.zeros_like(lengths)
    mask = (places >= offsets[:, None]) & (places < (offsets + lengths)[:, None])
    ids = np.full(mask.shape, pad, np.int64)
    ids[mask] = np.concatenate(sequences)
    return ids, mask.astype(np.int64), np.arange(len(sequences)) * time + offsets
