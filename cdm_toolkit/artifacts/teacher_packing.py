"""How the distributions of a teacher cache become bytes: ids without loss, log-probabilities in a few bits.

All functions take many positions at once. `teacher_packing_reference` states the same for one position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Float32, Integer, UInt8

Bits = UInt8[np.ndarray, "position bit"]
Bytes = UInt8[np.ndarray, "position byte"]
Ids = Integer[np.ndarray, "position count"]

HEAD = 8
"""Candidates that keep their rank and 8 bits: on real positions they hold nearly all of the probability."""
HEAD_LEVELS, TAIL_LEVELS = 256, 8
TAIL_BITS = 3
UNITS = 16
"""Steps a nat of the ranges that the levels cover, up to 15.9 nats; what is below counts as if it were there."""
LEAST_REST = 1e-7
"""Below it float32 cannot tell the probability of all other ids from 0."""
LOWEST = -1e4
"""Log-probability in place of minus infinity: float16 holds it, and its exponential is 0."""


def id_bits(vocab: int) -> int:
    """Give the bits that tell `vocab` ids apart.

    >>> id_bits(49_152), id_bits(2**17), id_bits(2**17 + 1)
    (16, 17, 18)
    """
    return max(1, (vocab - 1).bit_length())


def _to_bits(values: Ids, bits: int) -> Bits:
    shifts = np.arange(bits)[::-1]
    each = (values[:, :, None].astype(np.int32) >> shifts) & 1
    return each.astype(np.uint8).reshape(len(values), values.shape[1] * bits)


def _from_bits(each: Bits, bits: int) -> Ids:
    weights = (1 << np.arange(bits)[::-1]).astype(np.int32)
    return np.asarray(each.reshape(len(each), each.shape[1] // max(bits, 1), bits) @ weights, np.int32)


def pack(values: Ids, bits: int) -> Bytes:
    """Write each position's values at `bits` bits each, highest bit first; a position fills whole bytes."""
    return np.asarray(np.packbits(_to_bits(values, bits), axis=1))


def unpack(packed: Bytes, count: int, bits: int) -> Ids:
    """Read `count` values a position: the inverse of `pack`."""
    return _from_bits(np.unpackbits(packed, axis=1, count=count * bits), bits)


def _low_bits(count: int, vocab: int) -> int:
    """Choose how many low bits to store as they are, so that the whole is shortest."""
    return min(range(id_bits(vocab) + 1), key=lambda low: count * low + ((vocab - 1) >> low))


def pack_set(ids: Ids, vocab: int) -> Bytes:
    """Write `count` different ids below `vocab` a position, in ascending order (Elias, 1974; Fano, 1971).

    The low bits stand as they are. The high parts never fall, so that they are written as steps: a 0 for each
    step up, a 1 for each id. 64 ids of 128,256 take 104 bytes, 136 where their order is kept.
    """
    count = ids.shape[1]
    low = _low_bits(count, vocab)
    steps = np.zeros((len(ids), count + ((vocab - 1) >> low)), np.uint8)
    np.put_along_axis(steps, (ids >> low) + np.arange(count), 1, axis=1)
    bits = np.concatenate((_to_bits(ids & ((1 << low) - 1), low), steps), axis=1)
    return np.asarray(np.packbits(bits, axis=1))


def unpack_set(packed: Bytes, count: int, vocab: int) -> Ids:
    """Read `count` ids a position, ascending: the inverse of `pack_set`."""
    low = _low_bits(count, vocab)
    each = np.unpackbits(packed, axis=1, count=count * low + count + ((vocab - 1) >> low))
    high = np.nonzero(each[:, count * low :])[1].reshape(len(packed), count) - np.arange(count)
    lower = _from_bits(each[:, : count * low], low) if low else np.zeros_like(high)
    return np.asarray((high << low) | lower, np.int32)


def _log_sum(logprobs: Float[np.ndarray, "position topk"]) -> Float[np.ndarray, " position"]:
    return np.asarray(np.logaddexp.reduce(logprobs, axis=1, dtype=np.float64), np.float64)


def log_rest(logprobs: Float[np.ndarray, "position topk"]) -> Float16[np.ndarray, " position"]:
    """Give the log of the probability of all ids that are not among the candidates."""
    rest = -np.expm1(np.minimum(_log_sum(logprobs), 0))
    return np.asarray(np.log(np.maximum(rest, LEAST_REST)), np.float16)


def with_rest(
    logprobs: Float[np.ndarray, "position topk"], log_rest: Float16[np.ndarray, " position"]
) -> Float32[np.ndarray, "position topk"]:
    """Scale rounded probabilities so that they and the rest sum up to 1."""
    total = np.log1p(-np.exp(log_rest.astype(np.float64)))
    return np.asarray(logprobs + (total - _log_sum(logprobs))[:, None], np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Log-probabilities of a position in a few bits each.

    The first HEAD candidates, best first, have 256 levels from the best down to the last of them; the others 8,
    from the best of them to the worst. `ranges` are these two distances. Probability of the tail and of all other
    ids is kept apart, so that rounding moves nothing between head, tail and rest.
    """

    head: UInt8[np.ndarray, "position head"]
    tail: UInt8[np.ndarray, "position tail"]
    ranges: UInt8[np.ndarray, "position 2"]
    log_tail: Float16[np.ndarray, " position"]
    log_rest: Float16[np.ndarray, " position"]


def quantise(logprobs: Float[np.ndarray, "position topk"]) -> Levels:
    """Round log-probabilities to levels; the first HEAD are the best ones in their order, the others in any."""
    logprobs = np.maximum(logprobs, LOWEST).astype(np.float64)
    head, tail = logprobs[:, :HEAD], logprobs[:, HEAD:]
    head_codes, head_range = _rounded(head[:, :1] - head, HEAD_LEVELS)
    top = tail.max(axis=1, initial=LOWEST)[:, None]
    tail_codes, tail_range = _rounded(top - tail, TAIL_LEVELS)
    return Levels(
        head_codes,
        tail_codes,
        np.stack((head_range, tail_range), axis=1),
        _log_sum(tail).astype(np.float16),
        log_rest(logprobs),
    )


def _rounded(below: Float[np.ndarray, "position count"], levels: int) -> tuple[Any, Any]:
    """Round distances from the best to levels of the range that they span; give the levels and the range."""
    steps = np.clip(np.ceil(below.max(axis=1, initial=0) * UNITS), 1, 255)
    part = np.minimum(below * UNITS / steps[:, None], 1)
    return np.rint(part * (levels - 1)).astype(np.uint8), steps.astype(np.uint8)


def restore(levels: Levels) -> Float32[np.ndarray, "position topk"]:
    """Give the log-probabilities of levels, in the order that `quantise` got them."""
    ranges = levels.ranges.astype(np.float64)
    head = levels.head / (1 - HEAD_LEVELS) * ranges[:, :1] / UNITS
    tail = levels.tail / (1 - TAIL_LEVELS) * ranges[:, 1:] / UNITS
    log_tail = levels.log_tail.astype(np.float64)
    left = 1 - np.exp(log_tail) - np.exp(levels.log_rest.astype(np.float64))
    head += (np.log(np.maximum(left, LEAST_REST)) - _log_sum(head))[:, None]
    if tail.shape[1]:
        tail += (log_tail - _log_sum(tail))[:, None]
    return np.concatenate((head, tail), axis=1).astype(np.float32)
