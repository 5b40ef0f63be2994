"""The trie of spellings against a dictionary of all sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.vocab_map.spelling_trie import build_spelling_trie

SIZE, WIDTH = 3, 5
spellings = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=WIDTH), max_size=30)


def table(ways: list[list[int]]) -> np.ndarray:
    return np.array([[*way, *[-1] * (WIDTH - len(way))] for way in ways], np.int32).reshape(-1, WIDTH)


@given(spellings)
def test_equals_a_dictionary(ways: list[list[int]]) -> None:
    trie = build_spelling_trie(table(ways), SIZE)
    ids: dict[tuple[int, ...], int] = {}
    for i, way in enumerate(ways):
        if 1 < len(way) < WIDTH:
            ids.setdefault(tuple(way), i)
    nodes = {way[:depth] for way in ids for depth in range(1, len(way) + 1)}
    edges = dict(zip(trie.keys.tolist(), range(1, len(trie.keys) + 1), strict=True))
    assert sorted(edges) == trie.keys.tolist()
    assert len(nodes) == len(edges) == len(trie.ends) - 1
    for way in nodes:
        node = 0
        for token in way:
            node = edges[node * SIZE + token]
        assert trie.ends[node] == ids.get(way, -1)
    for i, way in enumerate(ways):
        above = [ids[tuple(way[:depth])] for depth in range(2, len(way)) if tuple(way[:depth]) in ids]
        assert trie.longest_prefix[i] == (above[-1] if above and len(way) < WIDTH else -1)
    assert trie.ends[0] == -1
