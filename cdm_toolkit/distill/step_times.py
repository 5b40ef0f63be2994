"""Where the time of training steps goes, by part; nothing waits for the device to know it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Literal, get_args

import torch

Part = Literal["data", "teacher", "student", "optimizer", "sampling"]
PARTS: tuple[Part, ...] = get_args(Part)


class StepTimes:
    """Sum up the seconds of each part of the steps: a part lasts until the next begins.

    On CUDA the parts end at events of the stream, so that a part has the time that the device took for it, or waited
    in it; elsewhere by the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._now: Callable[[], Any] = _event if device.type == "cuda" else perf_counter
        self._between: Callable[[Any, Any], float] = _seconds if device.type == "cuda" else lambda a, b: b - a
        self._ended: list[tuple[Part, Any, Any]] = []
        self._running: tuple[Part, Any] | None = None

    def begin(self, part: Part | None) -> None:
        """End the part that is running, and begin another; None where what comes is no part of a step."""
        now = self._now()
        if self._running is not None:
            self._ended.append((*self._running, now))
        self._running = None if part is None else (part, now)

    def take(self) -> dict[Part, float]:
        """Give the seconds of the parts that have ended since the last call. Waits for a device that is behind."""
        seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        for part, began, ended in self._ended:
            seconds[part] += self._between(began, ended)
        self._ended = []
        return seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000
