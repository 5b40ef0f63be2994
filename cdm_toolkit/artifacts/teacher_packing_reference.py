"""Reference implementation of `teacher_packing`: one position at a time, with strings of bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cdm_toolkit.artifacts.teacher_packing import (
    HEAD,
    HEAD_LEVELS,
    MIN_LOGPROB,
    MIN_REST,
    STEPS_PER_NAT,
    TAIL_LEVELS,
)


def _bytes(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def _digits(value: int, bits: int) -> str:
    return f"{value:0{bits}b}" if bits else ""


def pack_one(values: Sequence[int], bits: int) -> bytes:
    """Pack values with `bits` bits each, highest bit first."""
    return _bytes("".join(_digits(value, bits) for value in values))


def pack_set_one(ids: Sequence[int], vocab: int) -> bytes:
    """Pack ascending ids: their low bits, then their high parts in unary, 0 for an increment and 1 for an id."""

    def length(low: int) -> int:
        return len(ids) * (low + 1) + ((vocab - 1) >> low)

    low = min(range((vocab - 1).bit_length() + 1), key=length)
    unary, high = "", 0
    for value in ids:
        unary += "0" * ((value >> low) - high) + "1"
        high = value >> low
    unary += "0" * (((vocab - 1) >> low) - high)
    return _bytes("".join(_digits(value % (1 << low), low) for value in ids) + unary)


def quantise_one(logprobs: Sequence[float]) -> list[float]:
    """Return a position's log-probabilities after quantisation."""
    logprobs = [max(value, MIN_LOGPROB) for value in logprobs]
    head, tail = logprobs[:HEAD], logprobs[HEAD:]
    rest = max(1 - math.fsum(map(math.exp, logprobs)), MIN_REST)
    tail_mass = math.fsum(map(math.exp, tail))
    return _quantised(head, HEAD_LEVELS, max(1 - tail_mass - rest, MIN_REST)) + _quantised(
        tail, TAIL_LEVELS, tail_mass
    )


def _quantised(logprobs: list[float], levels: int, mass: float) -> list[float]:
    """Round differences from the maximum to levels, then rescale the probabilities to sum to `mass`."""
    if not logprobs:
        return []
    best = max(logprobs)
    span = min(max(math.ceil((best - min(logprobs)) * STEPS_PER_NAT), 1), 255) / STEPS_PER_NAT
    rounded = [
        round(min((best - value) / span, 1) * (levels - 1)) / (levels - 1) * -span for value in logprobs
    ]
    total = math.fsum(map(math.exp, rounded))
    scale = math.log(mass / total) if mass > 0 else MIN_LOGPROB
    return [value + scale for value in rounded]
