from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.compare.label_placement import XY, Room

FRAME = (0.0, 0.0, 400.0, 300.0)
WIDTH, HEIGHT = 40.0, 12.0


def box(center: XY, width: float = WIDTH, height: float = HEIGHT) -> tuple[float, float, float, float]:
    x, y = center
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > 1e-6 and min(a[3], b[3]) - max(a[1], b[1]) > 1e-6


def test_a_label_alone_is_to_the_right_of_its_point() -> None:
    assert Room(FRAME).label((100, 100), WIDTH, HEIGHT, away=5) == (125, 100)


def test_a_label_stays_in_the_frame() -> None:
    assert Room(FRAME).label((398, 100), WIDTH, HEIGHT, away=5)[0] < 380
    left, _, right, high = box(Room(FRAME).label((398, 299), WIDTH, HEIGHT, away=5))
    assert right < 398
    assert high <= 300
    assert left > 300


def test_labels_of_one_point_keep_off_each_other() -> None:
    room = Room(FRAME)
    boxes = [box(room.label((200, 150), WIDTH, HEIGHT, away=5)) for _ in range(4)]
    assert not any(overlap(a, b) for a, b in combinations(boxes, 2))


def test_a_label_keeps_off_points_and_lines() -> None:
    room = Room(FRAME)
    room.take((125, 100), 4)
    room.take_line((100, 100), (100, 200), 2)
    found = box(room.label((100, 100), WIDTH, HEIGHT, away=5))
    assert not overlap(found, box((125, 100), 8, 8))
    assert not overlap(found, (98.0, 98.0, 102.0, 202.0))


@pytest.mark.parametrize("end", [(100.0, 180.0), (180.0, 100.0), (100.0, 100.0), (37.0, 250.0)])
def test_a_line_is_taken_from_end_to_end(end: XY) -> None:
    room = Room(FRAME)
    room.take_line((100.0, 100.0), end, 5)
    for part in range(11):
        x, y = (100 + (end[0] - 100) * part / 10, 100 + (end[1] - 100) * part / 10)
        assert any(left <= x <= right and low <= y <= high for left, low, right, high in room._taken)


@given(st.lists(st.tuples(st.floats(60, 340), st.floats(40, 260)), min_size=1, max_size=5))
def test_a_few_labels_anywhere_have_room(points: list[XY]) -> None:
    room = Room(FRAME)
    boxes = [box(room.label(point, WIDTH, HEIGHT, away=5)) for point in points]
    assert not any(overlap(a, b) for a, b in combinations(boxes, 2))
    assert not any(b[0] < 0 or b[2] > 400 or b[1] < 0 or b[3] > 300 for b in boxes)
