"""Bit packing for the teacher cache: lossless for ids, quantised to a few bits for log-probabilities.

All functions are vectorised over positions. `teacher_packing_reference` is the definition for one position.
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
"""The top candidates, which keep their rank and 8 bits; they have nearly all of the probability in practice."""
HEAD_LEVELS, TAIL_LEVELS = 256, 8
TAIL_BITS = 3
STEPS_PER_NAT = 16
"""Resolution of `ranges`, which go up to 15.9 nats; lower log-probabilities are clipped to the range."""
MIN_REST = 1e-7
"""Minimum probability of all other ids: below it, float32 does not distinguish it from 0."""
MIN_LOGPROB = -1e4
"""Log-probability used instead of minus infinity: finite in float16, and its exponential is 0."""


def id_bits(vocab: int) -> int:
    """Return the number of bits of an id below `vocab`.

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
    """Pack each position's values with `bits` bits each, highest bit first; positions start at whole bytes."""
    return np.asarray(np.packbits(_to_bits(values, bits), axis=1))


def unpack(packed: Bytes, count: int, bits: int) -> Ids:
    """Unpack `count` values per position: the inverse of `pack`."""
    return _from_bits(np.unpackbits(packed, axis=1, count=count * bits), bits)


def _low_bits(count: int, vocab: int) -> int:
    """Choose the number of low bits that gives the shortest encoding."""
    return min(range(id_bits(vocab) + 1), key=lambda low: count * low + ((vocab - 1) >> low))


def pack_set(ids: Ids, vocab: int) -> Bytes:
    """Pack distinct ids below `vocab`, ascending in each position, with Elias-Fano coding (1974, 1971).

    Low bits are stored as they are. The high parts are non-decreasing and stored in unary: a 0 for each increment,
    a 1 for each id. 64 ids of 128,256 take 104 bytes; `pack`, which keeps their order, takes 136.
    """
    count = ids.shape[1]
    low = _low_bits(count, vocab)
    steps = np.zeros((len(ids), count + ((vocab - 1) >> low)), np.uint8)
    np.put_along_axis(steps, (ids >> low) + np.arange(count), 1, axis=1)
    bits = np.concatenate((_to_bits(ids & ((1 << low) - 1), low), steps), axis=1)
    return np.asarray(np.packbits(bits, axis=1))


def unpack_set(packed: Bytes, count: int, vocab: int) -> Ids:
    """Unpack `count` ids per position, ascending: the inverse of `pack_set`."""
    low = _low_bits(count, vocab)
    each = np.unpackbits(packed, axis=1, count=count * low + count + ((vocab - 1) >> low))
    high = np.nonzero(each[:, count * low :])[1].reshape(len(packed), count) - np.arange(count)
    lower = _from_bits(each[:, : count * low], low) if low else np.zeros_like(high)
    return np.asarray((high << low) | lower, np.int32)


def _log_sum(logprobs: Float[np.ndarray, "position topk"]) -> Float[np.ndarray, " position"]:
    return np.asarray(np.logaddexp.reduce(logprobs, axis=1, dtype=np.float64), np.float64)


def log_rest(logprobs: Float[np.ndarray, "position topk"]) -> Float16[np.ndarray, " position"]:
    """Return the log of the total probability of all ids that are not candidates."""
    rest = -np.expm1(np.minimum(_log_sum(logprobs), 0))
    return np.asarray(np.log(np.maximum(rest, MIN_REST)), np.float16)


def with_rest(
    logprobs: Float[np.ndarray, "position topk"], log_rest: Float16[np.ndarray, " position"]
) -> Float32[np.ndarray, "position topk"]:
    """Rescale rounded probabilities so that they and the rest sum to 1."""
    total = np.log1p(-np.exp(log_rest.astype(np.float64)))
    return np.asarray(logprobs + (total - _log_sum(logprobs))[:, None], np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedLogprobs:
    """Quantised log-probabilities of many positions.

    The first HEAD candidates, most probable first, have 256 levels between their maximum and minimum; the others (the
    tail) have 8. `ranges` are the two differences between maximum and minimum, in 1/STEPS_PER_NAT nats. The total
    probabilities of the tail and of all other ids (`log_tail`, `log_rest`) are stored separately, so that rounding
    moves no probability between head, tail and rest.
    """

    head: UInt8[np.ndarray, "position head"]
    tail: UInt8[np.ndarray, "position tail"]
    ranges: UInt8[np.ndarray, "position 2"]
    log_tail: Float16[np.ndarray, " position"]
    log_rest: Float16[np.ndarray, " position"]


def quantise(logprobs: Float[np.ndarray, "position topk"]) -> QuantisedLogprobs:
    """Quantise log-probabilities; the first HEAD are the most probable, in order, the others in any order."""
    logprobs = np.maximum(logprobs, MIN_LOGPROB).astype(np.float64)
    head, tail = logprobs[:, :HEAD], logprobs[:, HEAD:]
    head_codes, head_range = _rounded(head[:, :1] - head, HEAD_LEVELS)
    top = tail.max(axis=1, initial=MIN_LOGPROB)[:, None]
    tail_codes, tail_range = _rounded(top - tail, TAIL_LEVELS)
    return QuantisedLogprobs(
        head_codes,
        tail_codes,
        np.stack((head_range, tail_range), axis=1),
        _log_sum(tail).astype(np.float16),
        log_rest(logprobs),
    )


def _rounded(below: Float[np.ndarray, "position count"], levels: int) -> tuple[Any, Any]:
    """Round differences from the maximum to levels of the range that they span; return levels and range."""
    steps = np.clip(np.ceil(below.max(axis=1, initial=0) * STEPS_PER_NAT), 1, 255)
    part = np.minimum(below * STEPS_PER_NAT / steps[:, None], 1)
    return np.rint(part * (levels - 1)).astype(np.uint8), steps.astype(np.uint8)


def restore(levels: QuantisedLogprobs) -> Float32[np.ndarray, "position topk"]:
    """Dequantise log-probabilities, in the order in which they were passed to `quantise`."""
    ranges = levels.ranges.astype(np.float64)
    head = levels.head / (1 - HEAD_LEVELS) * ranges[:, :1] / STEPS_PER_NAT
    tail = levels.tail / (1 - TAIL_LEVELS) * ranges[:, 1:] / STEPS_PER_NAT
    log_tail = levels.log_tail.astype(np.float64)
    left = 1 - np.exp(log_tail) - np.exp(levels.log_rest.astype(np.float64))
    head += (np.log(np.maximum(left, MIN_REST)) - _log_sum(head))[:, None]
    if tail.shape[1]:
        tail += (log_tail - _log_sum(tail))[:, None]
    return np.concatenate((head, tail), axis=1).astype(np.float32)
