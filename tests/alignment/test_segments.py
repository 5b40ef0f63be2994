from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_toolkit.alignment.aligners import align_text, side_weights
from cdm_toolkit.alignment.anchored_reference import anchored
from cdm_toolkit.alignment.segments import align_segments, project
from cdm_toolkit.errors import BadOption, DoesNotSpell

from .invariants import invariant_violations, transposed

QUESTION, ANSWER = (
    "How many apples are in 12 baskets of 48?",
    "12 × 48 = <<12*48=576>>576 apples, Ана said. 🍎\n#### 576",
)
# A question and its answer as each family's chat template renders them; {} is a message's content.
TEMPLATES = {
    "qwen2": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>"
    ),
    "mistral": "<s>[INST] {} [/INST] {}</s>",
}


def rendered(view, *contents):
    """Render with a template; return the text and the byte ranges of the contents."""
    pieces, text = [], ""
    for literal, content in zip(TEMPLATES[view.name].split("{}"), (*contents, ""), strict=True):
        start = len((text + literal).encode())
        text += literal + content
        pieces.append((start, start + len(content.encode())))
    return view.encode(text), pieces[:-1]


def spelled(spans, first, last):
    return "".join(spans.view.token_text(int(i)) for i in spans.ids[first:last])


def within(alignment, spans_t, piece_t):
    """The groups inside a content, as byte offsets from its start."""
    start, end = piece_t
    return [
        (int(spans_t.start[g.t0]) - start, int(spans_t.end[g.t1 - 1]) - start, g.kind, g.exact)
        for g in alignment
        if g.t0 < g.t1 and start <= spans_t.start[g.t0] and spans_t.end[g.t1 - 1] <= end
    ]


def test_contents_align_as_they_do_alone(views):
    """For templates whose markers are separated from the text by special tokens or line ends."""
    t, s = views["llama3"], views["qwen2"]
    spans_t, pieces_t = rendered(t, QUESTION, ANSWER)
    spans_s, pieces_s = rendered(s, QUESTION, ANSWER)
    found = align_segments(spans_t, pieces_t, spans_s, pieces_s)
    assert invariant_violations(found) == []
    for content, piece in zip((QUESTION, ANSWER), pieces_t, strict=True):
        alone = align_text(t, s, content)
        expected = within(alone.alignment, alone.t, (0, len(content.encode())))
        assert within(found, spans_t, piece) == expected
        assert all(exact for *_, exact in expected)


def test_markers_align_by_role(views):
    spans_t, pieces_t = rendered(views["llama3"], QUESTION, ANSWER)
    spans_s, pieces_s = rendered(views["qwen2"], QUESTION, ANSWER)
    found = align_segments(spans_t, pieces_t, spans_s, pieces_s)
    markers = [
        (spelled(spans_t, g.t0, g.t1), spelled(spans_s, g.s0, g.s1), g.exact)
        for g in found
        if spans_t.special[g.t0 : g.t1].any() or spans_s.special[g.s0 : g.s1].any()
    ]
    turn = [
        ("<|start_header_id|>", "<|im_start|>", True),
        ("<|end_header_id|>", "", False),
        ("<|eot_id|>", "<|im_end|>", True),
    ]
    assert markers == [("<|begin_of_text|>", "", False), *turn, *turn]
    words = [(spelled(spans_t, g.t0, g.t1), spelled(spans_s, g.s0, g.s1)) for g in found]
    assert ("user", "user\n") in words
    assert ("assistant", "assistant\n") in words


@pytest.mark.parametrize("t", TEMPLATES)
@pytest.mark.parametrize("s", TEMPLATES)
def test_every_two_templates_cover_and_transpose(views, t, s):
    spans_t, pieces_t = rendered(views[t], QUESTION, ANSWER)
    spans_s, pieces_s = rendered(views[s], QUESTION, ANSWER)
    found = align_segments(spans_t, pieces_t, spans_s, pieces_s)
    assert invariant_violations(found, project(spans_t, pieces_t), project(spans_s, pieces_s)) == []
    back = transposed(align_segments(spans_s, pieces_s, spans_t, pieces_t))
    assert list(back) == list(found)
    if t == s:
        assert all(g.kind == "1-1" and g.exact for g in found)
    for piece_t in pieces_t:  # all but what a content's edge shares with the template
        inner = within(found, spans_t, piece_t)
        assert all(exact for *_, exact in inner[1:-1])


def test_a_template_without_special_markers_ends_a_turn_by_role(views):
    spans_t, pieces_t = rendered(views["mistral"], QUESTION, ANSWER)
    spans_s, pieces_s = rendered(views["qwen2"], QUESTION, ANSWER)
    found = align_segments(spans_t, pieces_t, spans_s, pieces_s)
    special = [(spelled(spans_t, g.t0, g.t1), spelled(spans_s, g.s0, g.s1)) for g in found if g.exact]
    assert ("</s>", "<|im_end|>") in special


def test_a_token_across_the_edge_of_a_content_keeps_the_part_inside(write):
    t = write(b"[A]Hi[/A]").token(0, 2).token(2, 5).token(5, 9).spans()
    side = project(t, [(3, 5)])
    assert side.text == b"Hi"
    assert side.start.tolist() == [0, 0, 2]
    assert side.end.tolist() == [0, 2, 2]
    assert side.marker.tolist() == [True, False, True]
    assert side.exact.tolist() == [False, False, False]
    s = write(b"Hi").token(0, 2).spans()
    assert [(g.kind, g.exact) for g in align_segments(t, [(3, 5)], s, [(0, 2)])] == [
        ("1-0", False),
        ("1-1", False),
        ("1-0", False),
    ]


def test_an_empty_content_leaves_its_markers(write):
    t = write(b"<u></u>").special_token(0, "turn_start", 3).special_token(3, "turn_end", 7).spans()
    s = write(b"").special_token(0, "turn_start").special_token(0, "turn_end").spans()
    found = align_segments(t, [(3, 3)], s, [(0, 0)])
    assert [(g.kind, g.exact) for g in found] == [("1-1", True)] * 2


def test_text_dropped_at_the_end_of_a_content_stays_in_it(write):
    t = write(b"a  |b").token(0, 1).special_token(3, "turn_end", 4).token(4, 5).spans()
    s = write(b"a  |b").token(0, 1).token(1, 3).special_token(3, "turn_end", 4).token(4, 5).spans()
    pieces = [(0, 3), (4, 5)]
    found = align_segments(t, pieces, s, pieces)
    assert [(g.kind, g.exact) for g in found] == [("1-n", False), ("1-1", True), ("1-1", True)]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_two_renderings_agree_with_the_twin(two_renderings, data):
    t, pieces_t, s, pieces_s = data.draw(two_renderings)
    found = align_segments(t, pieces_t, s, pieces_s)
    side_t, side_s = project(t, pieces_t), project(s, pieces_s)
    weight_t, weight_s = side_weights(side_t, None).tolist(), side_weights(side_s, None).tolist()
    groups, links = anchored(side_t, side_s, weight_t, weight_s)
    assert [((g.t0, g.t1, g.s0, g.s1), g.exact) for g in found] == groups
    assert [tuple(link) for link in found.links.tolist()] == links
    assert invariant_violations(found) == []
    assert list(transposed(align_segments(s, pieces_s, t, pieces_t))) == list(found)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_projected_tokens_stay_in_order_and_in_the_text(two_renderings, data):
    t, pieces, _, _ = data.draw(two_renderings)
    side = project(t, pieces)
    for offsets in (side.start, side.end, side.part):
        assert (offsets[1:] >= offsets[:-1]).all()
    assert (side.start <= side.end).all()
    assert not len(side) or (side.start[0] >= 0 and side.end[-1] <= len(side.text))


def test_pieces_that_do_not_fit_are_refused(write):
    t = write(b"abc").token(0, 3).spans()
    with pytest.raises(BadOption, match="a piece of the text"):
        align_segments(t, [(2, 3), (0, 1)], t, [(0, 1), (2, 3)])
    with pytest.raises(BadOption, match="a piece of the text"):
        align_segments(t, [(0, 9)], t, [(0, 3)])
    with pytest.raises(BadOption, match="the pieces' ends"):
        align_segments(t, [(0, 1), (1, 3)], t, [(0, 3)])
    with pytest.raises(DoesNotSpell):
        align_segments(t, [(0, 1)], t, [(1, 2)])
