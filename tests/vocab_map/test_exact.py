from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from cdm_toolkit.errors import UnknownTokenId
from cdm_toolkit.vocab_map.exact import build_exact, byte_pieces, exact_partners
from cdm_toolkit.vocab_map.static_reference import exact_reference

REAL = ("llama3", "qwen2", "gpt2", "opt", "smollm2", "mistral", "deepseek", "gemma2")


@pytest.mark.parametrize(("name_t", "name_s"), list(permutations(REAL, 2)))
def test_maps_exactly_the_ids_whose_bytes_the_student_has(name_t, name_s, real_view):
    view_t, view_s = real_view(name_t), real_view(name_s)
    mapping = build_exact(view_t, view_s)
    theirs = {data for data in view_s.token_bytes if data is not None}
    expected = {i for i, data in enumerate(view_t.token_bytes) if data in theirs}
    dense = mapping.dense()
    ordinary = {i for i in np.flatnonzero(dense >= 0).tolist() if i not in view_t.special}
    assert ordinary == expected
    assert all(view_s.token_bytes[dense[i]] == view_t.token_bytes[i] for i in expected)
    for i in set(np.flatnonzero(dense >= 0).tolist()) - ordinary:
        assert view_t.special[i].roles & view_s.special[int(dense[i])].roles


def test_llama3_and_qwen2_share_most_ids(llama3_view, qwen2_view):
    assert build_exact(llama3_view, qwen2_view).matched.sum() >= 108_000
    assert build_exact(qwen2_view, llama3_view).matched.sum() >= 108_000


def test_same_tokenizer_is_the_identity(any_view):
    dense = build_exact(any_view, any_view).dense()
    used = [i for i, data in enumerate(any_view.token_bytes) if data is not None]
    assert dense[used].tolist() == used


def test_a_character_goes_to_its_piece_and_not_to_its_byte_piece(mistral_view, smollm2_view):
    pieces = byte_pieces(mistral_view.token_bytes)
    assert len(pieces) == 256
    letter = smollm2_view.token_bytes.index(b"A")
    partner = int(build_exact(smollm2_view, mistral_view).dense()[letter])
    assert mistral_view.token_bytes[partner] == b"A"
    assert partner not in pieces


def test_equals_its_twin(rng, random_view):
    for _ in range(30):
        view_t, view_s = random_view(rng, "t", 60), random_view(rng, "s", 50)
        dense = exact_partners(view_t, view_s)
        assert {i: int(s) for i, s in enumerate(dense) if s >= 0} == exact_reference(view_t, view_s)


def test_special_tokens_match_by_role_whatever_they_are_called(toy_view):
    view_t = toy_view("t", [b"x", b"", b"", b"", b""], {1: "bos", 2: "pad", 3: None, 4: "eos turn_end"})
    view_s = toy_view("s", [b"", b"", b"x", b""], {0: "eos pad", 1: "bos", 3: None})
    # `eos turn_end` and `pad` find no token of the same first role, and go to one that shares a role.
    assert build_exact(view_t, view_s).dense().tolist() == [2, 1, 0, -1, 0]


def test_no_match_is_never_id_0(toy_view):
    mapping = build_exact(toy_view("t", [b"x", b"y"]), toy_view("s", [b"z", b"x"]))
    assert mapping.dense().tolist() == [1, -1]
    assert mapping.row(1) == []
    assert mapping.coverage == 0.5


def test_an_id_outside_is_refused(toy_view):
    mapping = build_exact(toy_view("t", [b"x"]), toy_view("s", [b"x"]))
    with pytest.raises(UnknownTokenId, match="the id 1 is not in the vocabulary of t"):
        mapping.row(1)
