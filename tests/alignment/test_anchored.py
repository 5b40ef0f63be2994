from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.alignment.anchored import align_anchored
from cdm_toolkit.alignment.anchored_reference import anchored
from cdm_toolkit.alignment.sides import AlignmentSide

from .invariants import invariant_violations, transposed


def rows(alignment):
    return [((g.t0, g.t1, g.s0, g.s1), g.exact) for g in alignment]


def links(alignment):
    return [tuple(link) for link in alignment.links.tolist()]


def random_weights(data, side):
    return data.draw(st.lists(st.integers(1, 5), min_size=len(side), max_size=len(side)))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_agrees_with_its_twin(spans_of_one_text, data):
    t, s = map(AlignmentSide.of, data.draw(spans_of_one_text))
    weight_t, weight_s = random_weights(data, t), random_weights(data, s)
    found = align_anchored(t, s, np.array(weight_t, np.int64), np.array(weight_s, np.int64))
    assert (rows(found), links(found)) == anchored(t, s, weight_t, weight_s)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_groups_cover_do_not_cross_and_are_minimal(spans_of_one_text, data):
    t, s = data.draw(spans_of_one_text)
    found = align(t, s)
    assert invariant_violations(found, t, s) == []
    cells = {(i, j) for g in found for i in range(g.t0, g.t1) for j in range(g.s0, g.s1)}
    assert set(links(found)) <= cells
    assert {i for i, _ in links(found)} == {i for i, _ in cells}
    assert {j for _, j in links(found)} == {j for _, j in cells}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_swap_is_transpose(spans_of_one_text, data):
    t, s = data.draw(spans_of_one_text)
    h_t = np.array(data.draw(st.lists(st.floats(0, 9), min_size=len(t.ids), max_size=len(t.ids))))
    h_s = np.array(data.draw(st.lists(st.floats(0, 9), min_size=len(s.ids), max_size=len(s.ids))))
    there = align(t, s, entropy_t=h_t, entropy_s=h_s)
    back = transposed(align(s, t, entropy_t=h_s, entropy_s=h_t))
    assert (rows(there), links(there)) == (rows(back), links(back))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_exact_groups_are_those_of_bytes(spans_of_one_text, data):
    t, s = data.draw(spans_of_one_text)
    assert [row for row, exact in rows(align(t, s)) if exact] == [
        row for row, exact in rows(align(t, s, aligner="bytes")) if exact
    ]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_sequence_aligns_with_itself_one_to_one(spans_of_one_text, data):
    t, _ = data.draw(spans_of_one_text)
    assert rows(align(t, t)) == [((i, i + 1, i, i + 1), True) for i in range(len(t.ids))]


def test_links_inside_an_exact_group_are_contextual(write):
    t = write(b"wonderful").token(0, 6).token(6, 9).spans()
    s = write(b"wonderful").token(0, 3).token(3, 9).spans()
    found = align(t, s)
    assert rows(found) == [((0, 2, 0, 2), True)]
    assert links(found) == [(0, 0), (1, 1)]
    assert len(align(t, s, aligner="bytes").links) == 4


def test_a_stretch_that_differs_is_warped_alone(write):
    text = b"x cat-dog y"
    t = write(text).token(0, 2).token(2, 9, b"caT").token(2, 9, b"-doG").token(9, 11).spans()
    s = write(text).token(0, 2).token(2, 5).token(5, 8).token(8, 9).token(9, 11).spans()
    stretch = [((1, 2, 1, 2), False), ((2, 3, 2, 4), False)]
    assert rows(align(t, s)) == [((0, 1, 0, 1), True), *stretch, ((3, 4, 4, 5), True)]
    assert rows(align(t, s, aligner="bytes"))[1] == ((1, 3, 1, 4), False)
