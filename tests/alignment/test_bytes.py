from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_toolkit.alignment import bytes_reference
from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.alignment.bytes import byte_groups
from cdm_toolkit.alignment.sides import AlignmentSide
from cdm_toolkit.errors import DoesNotSpell

from .invariants import invariant_violations, transposed


def rows(alignment):
    return [(g.t0, g.t1, g.s0, g.s1, g.exact) for g in alignment]


def test_groups_lie_between_shared_boundaries(write):
    t = write(b"strawberry").token(0, 3).token(3, 10).spans()
    s = write(b"strawberry").token(0, 3).token(3, 5).token(5, 10).spans()
    assert [g.kind for g in align(t, s, aligner="bytes")] == ["1-1", "1-n"]
    assert align(t, s, aligner="bytes").exact.all()


def test_half_characters_have_boundaries_inside_a_character(write):
    text = "한".encode()
    t = write(text).token(0, 2).token(2, 3).spans()
    s = write(text).token(0, 1).token(1, 3).spans()
    assert rows(align(t, s, aligner="bytes")) == [(0, 2, 0, 2, True)]
    assert [g.kind for g in align(t, t, aligner="bytes")] == ["1-1", "1-1"]


def test_a_dummy_prefix_joins_the_group_after_it(write):
    t = write(b"1").dummy(0).token(0, 1).spans()
    s = write(b"1").token(0, 1).spans()
    assert rows(align(t, s, aligner="bytes")) == [(0, 2, 0, 1, True)]


def test_zero_width_tokens_at_the_end_join_the_last_group(write):
    t = write(b"a").token(0, 1).token(1, 1, b"x").spans()
    s = write(b"a").token(0, 1).spans()
    assert rows(align(t, s, aligner="bytes")) == [(0, 2, 0, 1, False)]


def test_dropped_text_joins_the_group_after_it(write):
    t = write(b"a  b").token(0, 1).token(3, 4).spans()
    s = write(b"a  b").token(0, 1).token(1, 2).token(2, 3).token(3, 4).spans()
    assert rows(align(t, s, aligner="bytes")) == [(0, 1, 0, 1, True), (1, 2, 1, 4, False)]


def test_text_dropped_by_one_side_is_unmatched(write):
    t = write(b"  ").special_token(0, "bos").special_token(2, "eos").spans()
    s = write(b"  ").special_token(0, "bos").token(0, 2).special_token(2, "eos").spans()
    assert rows(align(t, s, aligner="bytes")) == [(0, 1, 0, 1, True), (1, 1, 1, 2, False), (1, 2, 2, 3, True)]


def test_the_same_change_on_both_sides_is_exact(write):
    text = "ﬁt".encode()
    t = write(text).token(0, 3, b"f").token(0, 3, b"i").token(3, 4).spans()
    s = write(text).token(0, 3, b"fi").token(3, 4).spans()
    assert rows(align(t, s, aligner="bytes")) == [(0, 2, 0, 1, True), (2, 3, 1, 2, True)]
    assert rows(align(t, t, aligner="bytes")) == [(i, i + 1, i, i + 1, True) for i in range(3)]


def test_a_change_on_one_side_is_not_exact(write):
    t = write(b"Hi you").token(0, 2, b"hi").token(2, 6).spans()
    s = write(b"Hi you").token(0, 2).token(2, 6).spans()
    assert rows(align(t, s, aligner="bytes")) == [(0, 1, 0, 1, False), (1, 2, 1, 2, True)]


def test_special_tokens_match_by_role_whatever_their_strings(write):
    t = write(b"a").special_token(0, "bos", content="<s>").token(0, 1).special_token(1, "eos").spans()
    s = write(b"a").special_token(0, "bos", content="[CLS]").token(0, 1).spans()
    found = align(t, s, aligner="bytes")
    assert rows(found) == [(0, 1, 0, 1, True), (1, 2, 1, 2, True), (2, 3, 2, 2, False)]
    assert [g.kind for g in found] == ["1-1", "1-1", "1-0"]


def test_unmatched_special_tokens_are_groups_of_their_own_teacher_first(write):
    t = write(b"a").special_token(0, "bos").special_token(0, "turn_start").token(0, 1).spans()
    s = write(b"a").special_token(0, "header_start").token(0, 1).spans()
    assert [g.kind for g in align(t, s, aligner="bytes")] == ["1-0", "1-0", "0-1", "1-1"]
    assert [g.kind for g in align(s, t, aligner="bytes")] == ["1-0", "0-1", "0-1", "1-1"]


def test_special_tokens_without_a_known_role_match_by_content(write):
    t = write(b"").special_token(0, None, content="<x>").spans()
    s = write(b"").special_token(0, None, content="<y>").spans()
    assert rows(align(t, t, aligner="bytes")) == [(0, 1, 0, 1, True)]
    assert len(align(t, s, aligner="bytes")) == 2


def test_a_special_token_in_the_text_is_matched_by_bytes(write):
    t = write(b"<s>a").special_token(0, "bos", 3, "<s>").token(3, 4).spans()
    s = write(b"<s>a").token(0, 1).token(1, 3).token(3, 4).spans()
    assert rows(align(t, s, aligner="bytes")) == [(0, 1, 0, 2, True), (1, 2, 2, 3, True)]


def test_nothing_aligns_with_nothing(write):
    assert len(align(write(b"").spans(), write(b"").spans(), aligner="bytes")) == 0


@pytest.mark.parametrize("aligner", ["bytes", "anchored"])
def test_spans_of_two_texts_are_refused(write, aligner):
    with pytest.raises(DoesNotSpell, match=r"token 1 \(X\) stands where the text has b'b'.*`aligner='dtw'`"):
        align(write(b"ab").token(0, 2).spans(), write(b"aX").token(0, 1).token(1, 2).spans(), aligner=aligner)
    with pytest.raises(DoesNotSpell):
        align(write(b"ab").token(0, 2).spans(), write(b"").spans(), aligner=aligner)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_agrees_with_its_twin(spans_of_one_text, data):
    t, s = map(AlignmentSide.of, data.draw(spans_of_one_text))
    groups, exact = byte_groups(t, s)
    assert list(zip(map(tuple, groups.tolist()), exact.tolist(), strict=True)) == bytes_reference.byte_groups(
        t, s
    )


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_groups_cover_do_not_cross_and_are_minimal(spans_of_one_text, data):
    t, s = data.draw(spans_of_one_text)
    assert invariant_violations(align(t, s, aligner="bytes"), t, s) == []


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_swap_is_transpose(spans_of_one_text, data):
    t, s = data.draw(spans_of_one_text)
    there, back = align(t, s, aligner="bytes"), transposed(align(s, t, aligner="bytes"))
    assert rows(there) == rows(back)
    assert np.array_equal(there.links, back.links)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_sequence_aligns_with_itself_one_to_one(spans_of_one_text, data):
    t, _ = data.draw(spans_of_one_text)
    assert rows(align(t, t, aligner="bytes")) == [(i, i + 1, i, i + 1, True) for i in range(len(t.ids))]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_where_tokens_spell_the_text_groups_are_its_shared_boundaries(honest_spans, data):
    t, s = data.draw(honest_spans)
    found = [
        g
        for g in align(t, s, aligner="bytes")
        if g.kind not in ("1-0", "0-1") and t.end[g.t0] > t.start[g.t0]
    ]
    assert all(g.exact for g in found)
    assert [int(t.end[g.t1 - 1]) for g in found] == sorted(set(t.end.tolist()) & set(s.end.tolist()) - {0})
