"""The neighbour table, MinED and prefix: against their references, and on real vocabularies."""

from __future__ import annotations

import numpy as np
import pytest

from cdm_toolkit.errors import BadOption, TokenizerMismatch
from cdm_toolkit.vocab_map.contextual_map import build_contextual_map
from cdm_toolkit.vocab_map.exact import build_exact
from cdm_toolkit.vocab_map.min_ed import build_min_ed
from cdm_toolkit.vocab_map.neighbours import build_neighbours
from cdm_toolkit.vocab_map.prefix import build_prefix
from cdm_toolkit.vocab_map.static_reference import min_ed_reference, neighbours_reference, prefix_reference


def _as_dict(mapping):
    return {i: int(student) for i, student in enumerate(mapping.dense()) if student >= 0}


@pytest.mark.parametrize("match_digits", [True, False])
@pytest.mark.parametrize("max_edit_distance", [0.2, 0.3, 0.45])
def test_neighbours_equal_their_twin_in_both_directions(match_digits, max_edit_distance, rng, random_view):
    for _ in range(6):
        view_t, view_s = random_view(rng, "t", 90), random_view(rng, "s", 80)
        table = build_neighbours(
            view_t, view_s, max_edit_distance=max_edit_distance, match_digits=match_digits
        )
        ranks = {}
        for way, expected in (
            (
                table.t_to_s,
                neighbours_reference(
                    view_t, view_s, max_edit_distance=max_edit_distance, match_digits=match_digits
                ),
            ),
            (
                table.s_to_t,
                neighbours_reference(
                    view_s, view_t, max_edit_distance=max_edit_distance, match_digits=match_digits
                ),
            ),
        ):
            for token_id in range(len(way.indptr) - 1):
                near = expected.get(token_id, [])
                assert [other for other, _ in way.row(token_id)] == [other for *_, other in near]
                assert np.allclose([far for _, far in way.row(token_id)], [far for far, *_ in near])
                lo, hi = way.indptr[token_id : token_id + 2]
                for rank, (*nearness, _) in zip(way.rank[lo:hi].tolist(), near, strict=True):
                    ranks.setdefault(rank, set()).add(tuple(nearness))
                    assert [rank // 2 % 2, rank % 2] == nearness[1:]
        # One rank is one nearness, and ranks are in its order.
        assert all(len(near) == 1 for near in ranks.values())
        assert [ranks[rank] for rank in sorted(ranks)] == sorted(ranks.values(), key=min)


@pytest.mark.parametrize("match_digits", [True, False])
def test_mined_equals_its_twin(match_digits, rng, random_view):
    for _ in range(12):
        view_t, view_s = random_view(rng, "t", 90), random_view(rng, "s", 80)
        mapping = build_min_ed(view_t, view_s, match_digits=match_digits)
        assert _as_dict(mapping) == min_ed_reference(view_t, view_s, match_digits=match_digits)


def test_prefix_equals_its_twin(rng, random_view):
    for _ in range(20):
        view_t, view_s = random_view(rng, "t", 90), random_view(rng, "s", 80)
        assert _as_dict(build_prefix(view_t, view_s)) == prefix_reference(view_t, view_s)


def test_match_digits_keeps_numbers_and_operators_apart(toy_view):
    tokens_t = [b"x12y", b" a==b", b" not", b"colour"]
    tokens_s = [b"x13y", b" a!=b", b" now", b"color"]
    view_t, view_s = toy_view("t", tokens_t), toy_view("s", tokens_s)
    matching = build_neighbours(view_t, view_s)
    assert [matching.t_to_s.row(i) for i in range(3)] == [[], [], []]
    assert [student for student, _ in matching.t_to_s.row(3)] == [3]
    free = build_neighbours(view_t, view_s, match_digits=False)
    assert [student for i in range(4) for student, _ in free.t_to_s.row(i)] == [0, 1, 2, 3]
    assert build_min_ed(view_t, view_s).dense().tolist()[:3] == [-1, -1, -1]
    assert build_min_ed(view_t, view_s, match_digits=False).dense().tolist() == [0, 1, 2, 3]


def test_half_characters_are_compared_by_their_bytes(toy_view):
    # U+FFFD would make all of these the same.
    view_t = toy_view("t", [b"\xe4\xb8\xad\xe6", b"\xe4\xb8"])
    view_s = toy_view("s", [b"\xe4\xb8\xad\xe7", b"\xf0\x9f\x98\x82\xf0"])
    table = build_neighbours(view_t, view_s)
    assert table.t_to_s.row(0) == [(0, pytest.approx(1 / 8))]
    assert table.t_to_s.row(1) == []


def test_blanks_alone_and_special_tokens_have_no_neighbours(toy_view):
    view_t = toy_view("t", [b"  ", b"<eos>", b" the"], {1: "eos"})
    view_s = toy_view("s", [b"   ", b"<eos>", b"the", b"\nthe"])
    table = build_neighbours(view_t, view_s)
    assert [table.t_to_s.row(i) for i in range(2)] == [[], []]
    assert [student for student, _ in table.t_to_s.row(2)] == [2, 3]
    # MinED counts blanks: they are near each other, and changing one is nearer than leaving it out.
    assert build_min_ed(view_t, view_s).dense().tolist() == [0, -1, 3]


def test_of_equal_distances_the_one_with_the_same_blanks_is_nearer(toy_view):
    table = build_neighbours(toy_view("t", [b" colour"]), toy_view("s", [b"color", b" color"]))
    assert [student for student, _ in table.t_to_s.row(0)] == [1, 0]


def test_what_has_nothing_in_common_is_no_match(toy_view):
    assert build_min_ed(toy_view("t", ["中".encode()]), toy_view("s", [b"!"])).dense().tolist() == [-1]


def test_empty_vocabularies_map_to_nothing(toy_view):
    view_t, view_s = toy_view("t", [None]), toy_view("s", [None, None])
    assert build_neighbours(view_t, view_s).t_to_s.row(0) == []
    assert build_min_ed(view_t, view_s).dense().tolist() == [-1]
    assert build_prefix(view_t, view_s).dense().tolist() == [-1]


def test_prefix_reaches_every_ordinary_token_of_real_tokenizers(smollm2_view, mistral_view, qwen2_view):
    for view_t, view_s in (
        (smollm2_view, mistral_view),
        (smollm2_view, qwen2_view),
        (mistral_view, qwen2_view),
    ):
        matched = build_prefix(view_t, view_s).matched
        ordinary = [i for i, data in enumerate(view_t.token_bytes) if data]
        assert matched[ordinary].all()


def test_contextual_map_has_the_exact_partner_or_all_neighbours(toy_view):
    view_t = toy_view("t", [b"abcdef", b"colour", b"q"])
    view_s = toy_view("s", [b"abcdef", b"color", b"colours"])
    exact, table = build_exact(view_t, view_s), build_neighbours(view_t, view_s)
    mapping = build_contextual_map(exact, table)
    assert mapping.row(0) == [(0, 1.0)]
    assert [student for student, _ in mapping.row(1)] == [2, 1]
    assert sum(weight for _, weight in mapping.row(1)) == pytest.approx(1)
    assert mapping.row(2) == []
    assert mapping.dense().tolist() == [0, 2, -1]
    with pytest.raises(TokenizerMismatch, match="was built for t "):
        build_contextual_map(build_exact(view_s, view_t), table)


@pytest.mark.parametrize("max_edit_distance", [0.0, 1.0, -0.3, 2.0, float("nan")])
def test_max_edit_distance_outside_0_and_1_is_refused(max_edit_distance, toy_view):
    view = toy_view("t", [b"x"])
    with pytest.raises(BadOption, match=r"`max_edit_distance` is .*; give a number between 0 and 1"):
        build_neighbours(view, view, max_edit_distance=max_edit_distance)


def test_no_workers_are_refused(toy_view):
    view = toy_view("t", [b"x"])
    with pytest.raises(BadOption, match="`workers` is 0"):
        build_min_ed(view, view, workers=0)


def test_neighbours_of_real_vocabularies_equal_brute_force(smollm2_view, mistral_view, smollm2_to_mistral):
    """Try all pairs of a sample of smollm2's open tokens with rapidfuzz."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    from cdm_toolkit.vocab_map.keys import token_keys
    from cdm_toolkit.vocab_map.neighbours import without_partner

    _, table = smollm2_to_mistral
    queries = without_partner(token_keys(smollm2_view, strip=True), smollm2_view, mistral_view)
    whole = [key for key in queries if key.text is not None][::20]
    choices = [key for key in token_keys(mistral_view, strip=True) if key.text is not None]
    lengths = np.add.outer([len(key.text) for key in whole], [len(key.text) for key in choices])
    near = (
        cdist([k.text for k in whole], [k.text for k in choices], scorer=Levenshtein.distance) / lengths < 0.3
    )
    text_ids = {key.id for key in choices}
    assert near.sum() > 1000
    for row, key in zip(near, whole, strict=True):
        expected = {choices[i].id for i in np.flatnonzero(row)}
        assert {student for student, _ in table.t_to_s.row(key.id) if student in text_ids} == expected
