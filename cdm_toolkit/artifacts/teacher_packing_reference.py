"""The packing of one position of a teacher cache, as the definition reads: strings of bits, no arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cdm_toolkit.artifacts.teacher_packing import (
    HEAD,
    HEAD_LEVELS,
    LEAST_REST,
    LOWEST,
    TAIL_LEVELS,
    UNITS,
)


def _bytes(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def _digits(value: int, bits: int) -> str:
    return f"{value:0{bits}b}" if bits else ""


def pack_one(values: Sequence[int], bits: int) -> bytes:
    """Write values at `bits` bits each, highest bit first."""
    return _bytes("".join(_digits(value, bits) for value in values))


def pack_set_one(ids: Sequence[int], vocab: int) -> bytes:
    """Write ascending ids: their low bits, then their high parts as a walk of 0 (a step up) and 1 (an id)."""

    def length(low: int) -> int:
        return len(ids) * (low + 1) + ((vocab - 1) >> low)

    low = min(range((vocab - 1).bit_length() + 1), key=length)
    walk, height = "", 0
    for value in ids:
        walk += "0" * ((value >> low) - height) + "1"
        height = value >> low
    walk += "0" * (((vocab - 1) >> low) - height)
    return _bytes("".join(_digits(value % (1 << low), low) for value in ids) + walk)


def quantise_one(logprobs: Sequence[float]) -> list[float]:
    """Give what is left of a position's log-probabilities when they have been rounded to levels."""
    logprobs = [max(value, LOWEST) for value in logprobs]
    head, tail = logprobs[:HEAD], logprobs[HEAD:]
    rest = max(1 - math.fsum(map(math.exp, logprobs)), LEAST_REST)
    tail_mass = math.fsum(map(math.exp, tail))
    return _near(head, HEAD_LEVELS, max(1 - tail_mass - rest, LEAST_REST)) + _near(
        tail, TAIL_LEVELS, tail_mass
    )


def _near(logprobs: list[float], levels: int, mass: float) -> list[float]:
    """Round distances from the best to levels, then scale so that the probabilities sum up to `mass`."""
    if not logprobs:
        return []
    best = max(logprobs)
    span = min(max(math.ceil((best - min(logprobs)) * UNITS), 1), 255) / UNITS
    rounded = [
        round(min((best - value) / span, 1) * (levels - 1)) / (levels - 1) * -span for value in logprobs
    ]
    total = math.fsum(map(math.exp, rounded))
    scale = math.log(mass / total) if mass > 0 else LOWEST
    return [value + scale for value in rounded]
