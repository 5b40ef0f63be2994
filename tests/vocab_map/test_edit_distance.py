from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from cdm_toolkit.vocab_map.edit_distance import near_pairs, nearest, pack

# Few symbols, so that strings are near; lengths to both sides of a machine word.
short = st.text("abcé中", min_size=1, max_size=9)
long = st.text("ab", min_size=55, max_size=75)
strings = st.lists(st.one_of(short, long), min_size=1, max_size=25)


def _packed(queries, choices):
    match_digits = np.zeros(len(queries), np.int32), np.zeros(len(choices), np.int32)
    return pack(queries, choices, match_digits, np.arange(len(choices), dtype=np.int32))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(strings, strings, st.sampled_from([0.05, 0.2, 0.3, 0.5, 0.9]), st.booleans())
def test_near_pairs_are_those_that_rapidfuzz_finds(queries, choices, max_edit_distance, as_bytes):
    if as_bytes:
        queries, choices = [s.encode() for s in queries], [s.encode() for s in choices]
    found = near_pairs(*_packed(queries, choices), max_edit_distance=max_edit_distance)
    got = sorted(zip(found.query, found.choice, found.edits, found.total, strict=True))
    expected = [
        (i, j, edits, len(a) + len(b))
        for i, a in enumerate(queries)
        for j, b in enumerate(choices)
        if (edits := Levenshtein.distance(a, b)) / (len(a) + len(b)) < max_edit_distance
    ]
    assert got == expected


@settings(deadline=None, max_examples=200, derandomize=True)
@given(strings, strings)
def test_nearest_is_the_minimum_over_all(queries, choices):
    found = nearest(*_packed(queries, choices))
    got = dict(zip(found.query.tolist(), found.choice.tolist(), strict=True))
    expected = {}
    for i, a in enumerate(queries):
        options = [
            (edits / (len(a) + len(b)), j)
            for j, b in enumerate(choices)
            if (edits := Levenshtein.distance(a, b)) < max(len(a), len(b))
        ]
        if options:
            expected[i] = min(options)[1]
    assert got == expected


@pytest.mark.parametrize("find", [near_pairs, nearest])
def test_workers_change_nothing_and_progress_reaches_the_end(find, rng):
    words = ["".join(rng.choices("abc", k=rng.randint(1, 8))) for _ in range(1500)]
    seen = []
    options = {"max_edit_distance": 0.3} if find is near_pairs else {}
    one = find(*_packed(words, words), lambda done, total: seen.append((done, total)), **options)
    two = find(*_packed(words, words), workers=3, **options)
    for column in ("query", "choice", "edits", "total"):
        assert np.array_equal(getattr(one, column), getattr(two, column))
    assert seen[-1] == (1500, 1500)
    assert seen == sorted(seen)
