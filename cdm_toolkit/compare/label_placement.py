"""Place text labels in a crowded picture: beside their points, where they cover least. Pure; lengths in pixels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

XY = tuple[float, float]
"""Across and up."""
Box = tuple[float, float, float, float]
"""Left, low, right, high."""

_DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.9, 0.9), (-0.9, 0.9), (-0.9, -0.9), (0.9, -0.9))
_FARTHER = (0.0, 8.0, 18.0, 30.0)
_BETWEEN = 8.0
"""From one box to the next along a line."""
_OUTSIDE = 3.0
"""How much worse it is to leave the frame than to cover something."""


class Room:
    """What is taken of a frame, and the positions that are still free in it."""

    def __init__(self, frame: Box) -> None:
        self._frame = np.array([frame])
        self._taken: list[Box] = []

    def take(self, center: XY, radius: float) -> None:
        """Take a square."""
        x, y = center
        self._taken.append((x - radius, y - radius, x + radius, y + radius))

    def take_line(self, begin: XY, end: XY, radius: float) -> None:
        """Take all along a line."""
        pieces = 1 + int(max(abs(begin[0] - end[0]), abs(begin[1] - end[1])) / _BETWEEN)
        for xy in np.linspace(begin, end, pieces + 1).tolist():
            self.take((xy[0], xy[1]), radius)

    def label(self, at: XY, width: float, height: float, *, away: float) -> XY:
        """Take a position for a label `away` or a little more from a point, and return its center."""
        boxes = [
            _around(at, width, height, away + farther, way) for farther in _FARTHER for way in _DIRECTIONS
        ]
        best = min(boxes, key=self._cost)
        self._taken.append(best)
        return (best[0] + best[2]) / 2, (best[1] + best[3]) / 2

    def _cost(self, box: Box) -> float:
        outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, self._frame)
        return _overlap(box, np.array(self._taken).reshape(-1, 4)) + _OUTSIDE * outside


def _around(at: XY, width: float, height: float, away: float, way: tuple[float, float]) -> Box:
    x, y = at[0] + way[0] * (away + width / 2), at[1] + way[1] * (away + height / 2)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(box: Box, others: Float[np.ndarray, "boxes 4"]) -> float:
    """Return the area that a box shares with others, each counted."""
    wide = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    high = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    return float((wide.clip(min=0) * high.clip(min=0)).sum())
