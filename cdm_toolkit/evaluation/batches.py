"""Which items a model reads together."""

from __future__ import annotations

from collections.abc import Sequence

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


def batches(
    lengths: Sequence[int], size: int | None = None, *, tokens: int = TOKENS_AT_ONCE
) -> list[list[int]]:
    """Put items of like length together, the longest first: `size` a batch, else as many as `tokens` allow.

    They depend on nothing but the lengths, so that a run that goes on makes the batches of an unbroken one.

    >>> batches([5, 1, 9, 2], tokens=10)
    [[2], [0, 3], [1]]
    >>> batches([5, 1, 9, 2], 3)
    [[2, 0, 3], [1]]
    """
    made: list[list[int]] = []
    room = 0
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if not room:
            room = size or max(1, tokens // max(1, lengths[place]))
            made.append([])
        made[-1].append(place)
        room -= 1
    return made
