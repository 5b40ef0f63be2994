from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from cdm_toolkit.alignment import dtw_reference
from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.alignment.dtw import path_groups, token_distance, token_distances, warp
from cdm_toolkit.errors import BadOption

from .invariants import invariant_violations

tokens = st.lists(
    st.one_of(
        st.text("ab12é한 ", max_size=5).map(str.encode),
        st.binary(max_size=3),
        st.integers(31, 34).map(lambda n: b"ab" * n),
    ),
    min_size=1,
    max_size=9,
)
weight = st.integers(1, 9)


def warped(t, s, weight_t, weight_s):
    kinds_t, kinds_s = sorted(set(t)), sorted(set(s))
    path, cost = warp(
        token_distances(kinds_t, kinds_s),
        np.array([kinds_t.index(token) for token in t]),
        np.array([kinds_s.index(token) for token in s]),
        np.array(weight_t, np.int64),
        np.array(weight_s, np.int64),
    )
    return [tuple(link) for link in path.tolist()], cost


@settings(max_examples=250, deadline=None)
@given(t=tokens, s=tokens, data=st.data())
def test_same_cost_and_path_as_the_paper(t, s, data):
    weight_t = data.draw(st.lists(weight, min_size=len(t), max_size=len(t)))
    weight_s = data.draw(st.lists(weight, min_size=len(s), max_size=len(s)))
    assert warped(t, s, weight_t, weight_s) == dtw_reference.warp(t, s, weight_t, weight_s)


def test_same_cost_and_path_on_many_sequences_that_differ_little():
    random = np.random.default_rng(0)  # few symbols: many ties
    for _ in range(200):
        n, m = random.integers(1, 30, 2)
        t, s = (
            [bytes(random.integers(97, 99, random.integers(1, 3)).tolist()) for _ in range(k)] for k in (n, m)
        )
        weight_t, weight_s = random.integers(3, 6, n).tolist(), random.integers(3, 6, m).tolist()
        assert warped(t, s, weight_t, weight_s) == dtw_reference.warp(t, s, weight_t, weight_s)


@settings(max_examples=100, deadline=None)
@given(t=tokens, s=tokens)
def test_swapping_the_sides_keeps_the_cost(t, s):
    """The path may differ: ties go to the teacher, whoever that is."""
    ones_t, ones_s = [1] * len(t), [1] * len(s)
    assert warped(t, s, ones_t, ones_s)[1] == warped(s, t, ones_s, ones_t)[1]


def test_ties_go_to_the_diagonal_then_the_teacher():
    same = [b"a"] * 3
    assert warped(same, same, [1] * 3, [1] * 3)[0] == [(0, 0), (1, 1), (2, 2)]
    # every path costs the same: back from the end, diagonals come first, and then the teacher's steps
    assert warped([b"a"] * 3, [b"a"] * 2, [1] * 3, [1] * 2)[0] == [(0, 0), (1, 0), (2, 1)]


@settings(max_examples=100, deadline=None)
@given(t=tokens, s=tokens)
def test_distances_are_levenshtein_over_characters_or_bytes(t, s):
    found = token_distances(t, s)
    for i, a in enumerate(t):
        for j, b in enumerate(s):
            assert found[i, j] == token_distance(a, b) == dtw_reference.token_distance(a, b)
            assert dtw_reference.levenshtein(a, b) == Levenshtein.distance(a, b)


def test_two_different_half_characters_are_not_alike():
    assert dtw_reference.token_distance(b"\xe5", b"\xe6") == 1
    assert dtw_reference.token_distance("é".encode(), b"e") == 1
    assert dtw_reference.token_distance("é".encode(), b"\xc3") == 1


@settings(max_examples=100, deadline=None)
@given(t=tokens, s=tokens)
def test_groups_are_the_connected_parts_of_the_path(t, s):
    path, _ = warped(t, s, [1] * len(t), [1] * len(s))
    assert [tuple(row) for row in path_groups(np.array(path)).tolist()] == dtw_reference.path_groups(path)


def test_entropies_move_the_path(write):
    t = write(b"abcd").token(0, 2).token(2, 4).spans()
    s = write(b"abcd").token(0, 1).token(1, 3).token(3, 4).spans()
    plain = align(t, s, aligner="entropy-dtw")
    assert plain.links.tolist() == align(t, s, aligner="dtw").links.tolist() == [[0, 0], [0, 1], [1, 2]]
    sure_of_the_last = {"entropy_t": np.array([1.0, 0.0]), "entropy_s": np.zeros(3)}
    assert align(t, s, aligner="entropy-dtw", **sure_of_the_last).links.tolist() == [[0, 0], [1, 1], [1, 2]]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), aligner=st.sampled_from(["dtw", "entropy-dtw"]))
def test_any_two_sequences_are_covered(spans_of_one_text, data, aligner):
    (t, _), (s, _) = data.draw(spans_of_one_text), data.draw(spans_of_one_text)
    found = align(t, s, aligner=aligner)
    assert invariant_violations(found) == []
    if len(t.ids) and len(s.ids):
        cells = {(i, j) for g in found for i in range(g.t0, g.t1) for j in range(g.s0, g.s1)}
        assert {tuple(link) for link in found.links.tolist()} <= cells


def test_exact_marks_groups_with_equal_bytes(write):
    t = write(b"abc").special_token(0, "bos").token(0, 1).token(1, 3).spans()
    s = write(b"abX").special_token(0, "bos", content="<s>").token(0, 1).token(1, 3).spans()
    assert align(t, s, aligner="dtw").exact.tolist() == [True, True, False]


def test_a_table_larger_than_memory_is_refused():
    ones = np.ones(1 << 18, np.int64)
    with pytest.raises(BadOption, match="give anchored"):
        warp(np.zeros((2, 2), np.int16), ones, ones, ones, ones)
