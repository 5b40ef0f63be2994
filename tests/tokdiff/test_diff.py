"""The difference of two tokenizers."""

from __future__ import annotations

import numpy as np
import pytest

from cdm_toolkit.tokdiff.diff import diff, shared_ids


@pytest.mark.parametrize("name", ["qwen2", "mistral", "smollm2"])
def test_a_tokenizer_does_not_differ_from_itself(real_view, name):
    view = real_view(name)
    same = diff(view, view)
    assert same.same
    assert same.moved.size == 0
    assert same.a == same.b
    assert same.a.only_here == 0
    assert same.roles_of_one == ()
    assert len(same.shared) == view.vocab_size - same.a.without_bytes


def test_shared_ids_are_those_of_equal_bytes(llama3_view, qwen2_view):
    found = diff(llama3_view, qwen2_view)
    truth = {token for token in llama3_view.token_bytes if token} & {t for t in qwen2_view.token_bytes if t}
    assert len(found.shared) == len(truth) >= 108_000
    for a, b in found.shared[::997].tolist():
        assert llama3_view.token_bytes[a] == qwen2_view.token_bytes[b]
    assert found.a.only_here == 128_000 - len(truth)
    assert len(found.moved) == np.count_nonzero(found.shared[:, 0] != found.shared[:, 1])
    assert not found.same


def test_swapping_the_sides_swaps_the_difference(smollm2_view, mistral_view):
    one, other = diff(smollm2_view, mistral_view), diff(mistral_view, smollm2_view)
    assert (one.a, one.b) == (other.b, other.a)
    assert sorted(map(tuple, one.shared[:, ::-1].tolist())) == sorted(map(tuple, other.shared.tolist()))


def test_ids_of_equal_bytes_are_paired_in_order(mistral_view, llama2_view):
    blanks = [i for i, token in enumerate(mistral_view.token_bytes) if token == b" "]
    assert len(blanks) == 2, "<0x20> and ▁"
    pairs = shared_ids(mistral_view, llama2_view)
    assert [a for a, _ in pairs.tolist() if a in blanks] == blanks
    assert len(set(pairs[:, 1].tolist())) == len(pairs), "each id once"


def test_sums_up_each_side(llama3_view, mistral_view):
    found = diff(llama3_view, mistral_view)
    assert (found.a.view.family, found.b.view.family) == ("byte-level BPE", "SentencePiece BPE")
    assert found.b.view.scheme.normalizers == ("Prepend", "Replace")
    assert [token.content for token in found.b.special_by_role["eos"]] == ["</s>"]
    assert "header_start" in found.roles_of_one
    lengths = [len(token or b"") for token in llama3_view.token_bytes]
    assert [lengths[i] for i in found.a.longest] == sorted(lengths, reverse=True)[:10]
