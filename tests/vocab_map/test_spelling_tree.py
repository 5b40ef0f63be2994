"""The tree of spellings against a dictionary of all sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.vocab_map.spelling_tree import build_spelling_tree

SIZE, WIDTH = 3, 5
spellings = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=WIDTH), max_size=30)


def table(ways: list[list[int]]) -> np.ndarray:
    return np.array([[*way, *[-1] * (WIDTH - len(way))] for way in ways], np.int32).reshape(-1, WIDTH)


@given(spellings)
def test_equals_a_dictionary(ways: list[list[int]]) -> None:
    tree = build_spelling_tree(table(ways), SIZE)
    ids: dict[tuple[int, ...], int] = {}
    for i, way in enumerate(ways):
        if 1 < len(way) < WIDTH:
            ids.setdefault(tuple(way), i)
    nodes = {way[:depth] for way in ids for depth in range(1, len(way) + 1)}
    edges = dict(zip(tree.keys.tolist(), range(1, len(tree.keys) + 1), strict=True))
    assert sorted(edges) == tree.keys.tolist()
    assert len(nodes) == len(edges) == len(tree.ends) - 1
    for way in nodes:
        node = 0
        for token in way:
            node = edges[node * SIZE + token]
        assert tree.ends[node] == ids.get(way, -1)
    for i, way in enumerate(ways):
        above = [ids[tuple(way[:depth])] for depth in range(2, len(way)) if tuple(way[:depth]) in ids]
        assert tree.above[i] == (above[-1] if above and len(way) < WIDTH else -1)
    assert tree.ends[0] == -1
