"""Group sequences of similar length into batches, and pad them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int, Int64

Padding = Literal["right", "left"]
TOKENS_AT_ONCE = 8192
"""Default size of a batch in tokens, padding included."""
LOGITS_AT_ONCE = 2**27
"""Maximum size of the logits of a batch (positions × vocabulary) whose positions are all scored: 0.5 GiB in float32."""


def scored_positions(vocabulary: int) -> int:
    """Return the batch size in positions for batches whose logits are all scored.

    >>> scored_positions(700), scored_positions(151_936)
    (8192, 883)
    """
    return max(1, min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary))


def batches(
    lengths: Sequence[int],
    size: int | None = None,
    *,
    tokens: int | None = None,
    logits: Sequence[int] | None = None,
) -> list[list[int]]:
    """Group items of similar length, longest first: at most `size` items and `tokens` tokens per batch.

    Without either, `TOKENS_AT_ONCE` is the limit. Padding counts as tokens. With `logits`, the number that is made for
    each item, a batch has at most `LOGITS_AT_ONCE` of these besides. Batches depend only on these numbers, so a
    resumed run makes the same batches as an uninterrupted one.

    >>> batches([5, 1, 9, 2], tokens=10)
    [[2], [0, 3], [1]]
    >>> batches([5, 1, 9, 2], 3)
    [[2, 0, 3], [1]]
    >>> batches([5, 1, 9, 2], 1, tokens=10)
    [[2], [0], [3], [1]]
    >>> batches([5, 1, 9, 2], logits=[LOGITS_AT_ONCE, 1, 2, LOGITS_AT_ONCE - 1])
    [[2], [0], [3, 1]]
    """
    if size is None and tokens is None:
        tokens = TOKENS_AT_ONCE
    made: list[list[int]] = []
    room = room_for_logits = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        own = 0 if logits is None else logits[index]
        if not room or own > room_for_logits:
            room = len(lengths) if size is None else size
            if tokens is not None:
                room = min(room, max(1, tokens // max(1, lengths[index])))
            room_for_logits = LOGITS_AT_ONCE
            made.append([])
        made[-1].append(index)
        room -= 1
        room_for_logits -= own
    return made


def padded(
    sequences: Sequence[Sequence[int] | Int[np.ndarray, " _"]], pad: int = 0, padding: Padding = "right"
) -> tuple[Int64[np.ndarray, "batch time"], Int64[np.ndarray, "batch time"], Int64[np.ndarray, " batch"]]:
    """Pad sequences to one length; return ids, mask, and the offset of each sequence in the flattened batch × time.

    >>> ids, mask, starts = padded([[5, 6, 7], [8]], padding="left")
    >>> ids.tolist(), mask.tolist(), starts.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]], [0, 5])
    """
    lengths = np.array([len(ids) for ids in sequences])
    time = int(lengths.max())
    positions = np.arange(time)
    offsets = time - lengths if padding == "left" else np.zeros_like(lengths)
    mask = (positions >= offsets[:, None]) & (positions < (offsets + lengths)[:, None])
    ids = np.full(mask.shape, pad, np.int64)
    ids[mask] = np.concatenate(sequences)
    return ids, mask.astype(np.int64), np.arange(len(sequences)) * time + offsets


def packed(
    sequences: Sequence[Sequence[int] | Int[np.ndarray, " _"]], pad: int = 0, *, rows: int | None = None
) -> tuple[Int64[np.ndarray, "batch time"], Int64[np.ndarray, "batch time"], Int64[np.ndarray, " sequence"]]:
    """Lay sequences end to end in few rows; return ids, positions, and the offset of each sequence in batch × time.

    No row is longer than two of the longest sequence, unless the number of `rows` is given: attention by a mask costs
    the square of a row. They are filled evenly. Positions count from 0 in each sequence, as they do in what fills up a
    row: a model whose attention restarts with them keeps the sequences apart.

    >>> ids, positions, starts = packed([[5, 6, 7], [8], [9, 9], [4, 4]])
    >>> ids.tolist(), positions.tolist(), starts.tolist()
    ([[5, 6, 7, 8], [9, 9, 4, 4]], [[0, 1, 2, 0], [0, 1, 0, 1]], [0, 3, 4, 6])
    """
    lengths = np.array([len(ids) for ids in sequences])
    row, starts, time = _even_rows(lengths, rows)
    ids, positions = np.full((row.max() + 1, time), pad, np.int64), np.zeros((row.max() + 1, time), np.int64)
    ends = np.zeros(len(ids), np.int64)
    for sequence, nth, start, length in zip(sequences, row, starts, lengths, strict=True):
        ids[nth, start : start + length] = sequence
        positions[nth, start : start + length] = np.arange(length)
        ends[nth] = max(ends[nth], start + length)
    for nth, end in enumerate(ends):
        positions[nth, end:] = np.arange(time - end)
    return ids, positions, row * time + starts


def _even_rows(
    lengths: Int64[np.ndarray, " sequence"], rows: int | None
) -> tuple[Int64[np.ndarray, " sequence"], Int64[np.ndarray, " sequence"], int]:
    """Put each sequence, the longest first, into the emptiest row; give its row and start, and the length of all."""
    room = 2 * int(lengths.max())
    many = rows or -(-int(lengths.sum()) // room)
    while True:
        row, starts, filled = np.zeros_like(lengths), np.zeros_like(lengths), np.zeros(many, np.int64)
        for nth in np.argsort(-lengths, kind="stable"):
            row[nth] = filled.argmin()
            starts[nth] = filled[row[nth]]
            filled[row[nth]] += lengths[nth]
        if rows is not None or filled.max() <= room:
            return row, starts, int(filled.max())
        many += 1
