"""What a new vocabulary's rows are made of: against the reference, and on real vocabularies."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cdm_toolkit.tokdiff.view import TokenizerView, make_view
from cdm_toolkit.vocab_map.exact import preferred_ids
from cdm_toolkit.vocab_map.row_sources import SourceKind, row_sources
from cdm_toolkit.vocab_map.row_sources_reference import row_sources_reference
from cdm_toolkit.vocab_map.spelling import build_spellings, fewest_tokens, spell
from cdm_toolkit.vocab_map.spelling_reference import (
    fewest_tokens_reference,
    spelling_reference,
    spellings_reference,
)
from cdm_toolkit.vocab_map.spelling_trie import DEEPEST

View = Callable[[str], TokenizerView]


def _trained(tokenizer: Tokenizer, texts: list[str], size: int, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        max_token_length=6,  # the twin tries every spelling
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _byte_level(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[::2]  # half of the bytes have no token
    return _trained(tokenizer, texts, size, alphabet)


def _with_blank_before(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return _trained(tokenizer, texts, size, [])


@pytest.fixture(scope="module")
def small(multilingual: list[str]) -> list[TokenizerView]:
    """Train four small tokenizers: two kinds, two sizes."""
    return [
        make_view(
            f"{make.__name__} {size}", make(multilingual, size), {"bos_token": "<s>", "eos_token": "</s>"}
        )
        for make in (_byte_level, _with_blank_before)
        for size in (350, 600)
    ]


def test_equal_their_twin(small: list[TokenizerView]) -> None:
    seen = set()
    for old, new in permutations(small, 2):
        found = row_sources(old, new)
        assert [
            (SourceKind(kind), found.row(i)) for i, kind in enumerate(found.kind)
        ] == row_sources_reference(old, new)
        seen |= set(found.kind.tolist())
    assert seen == set(SourceKind) - {SourceKind.OMP}, "each kind occurs in the test"


def test_spellings_equal_their_twin(small: list[TokenizerView]) -> None:
    longest = 3
    for t, s in permutations(small, 2):
        found = build_spellings(t, s, longest)
        twin_t, twin_s = spellings_reference(t, s), spellings_reference(s, t)
        assert found.of_t.tolist() == [(way + [-1] * longest)[:longest] for way in twin_t]
        width = DEEPEST + 1
        assert found.of_s.tolist() == [(way + [-1] * width)[:width] for way in twin_s]


@pytest.mark.parametrize(("old", "new"), [("smollm2", "mistral"), ("mistral", "qwen2"), ("qwen2", "gpt2")])
def test_real_spellings_equal_their_twin(old: str, new: str, real_view: View, rng: random.Random) -> None:
    view_old, view_new = real_view(old), real_view(new)
    pieces = rng.sample([data for data in view_new.token_bytes if data and len(data) < 9], 60)
    assert spell(view_old, pieces) == [spelling_reference(view_old, data) for data in pieces]


@given(st.text("abc", max_size=9), st.sets(st.text("abc", min_size=1, max_size=4), max_size=9))
def test_fewest_tokens_equals_its_twin(text: str, tokens: set[str]) -> None:
    ids = {token.encode(): i for i, token in enumerate(sorted(tokens))}
    longest = max(map(len, ids), default=0)
    assert fewest_tokens(text.encode(), ids, longest) == fewest_tokens_reference(text.encode(), ids)


def test_a_tokenizer_is_made_of_itself(any_view: TokenizerView) -> None:
    found = row_sources(any_view, any_view)
    served = found.kind != SourceKind.FRESH
    assert np.diff(found.indptr)[served].tolist() == [1] * served.sum()
    assert found.ids.tolist() == np.flatnonzero(served).tolist()
    assert all(any_view.token_bytes[i] is None for i in np.flatnonzero(~served))


@pytest.mark.parametrize(("old", "new"), [("smollm2", "mistral"), ("mistral", "smollm2")])
def test_old_tokens_spell_the_new_bytes_exactly(old: str, new: str, real_view: View) -> None:
    view_old, view_new = real_view(old), real_view(new)
    found = row_sources(view_old, view_new)
    bounds, ids = found.indptr.tolist(), found.ids.tolist()
    for i in np.flatnonzero(np.isin(found.kind, (SourceKind.COPIED, SourceKind.MEAN))).tolist():
        old_bytes = [view_old.token_bytes[old_id] or b"?" for old_id in ids[bounds[i] : bounds[i + 1]]]
        assert b"".join(old_bytes) == view_new.token_bytes[i]
    counts = found.counts
    assert counts.copied + counts.by_role + counts.mean + counts.fresh == view_new.vocab_size


def test_half_characters_are_spelled_by_bytes(mistral_view: TokenizerView, qwen2_view: TokenizerView) -> None:
    half = next(i for i, data in enumerate(qwen2_view.token_bytes) if data == b"\xe2\x96")
    (found,) = spell(mistral_view, [qwen2_view.literals[half]])
    assert [mistral_view.token_bytes[i] for i in found] == [b"\xe2", b"\x96"]


def test_words_are_spelled_as_the_old_tokenizer_cuts_them(smollm2_view: TokenizerView) -> None:
    (digits, word) = spell(smollm2_view, [b"2024", b" croissants"])
    assert [smollm2_view.token_bytes[i] for i in digits] == [b"2", b"0", b"2", b"4"]
    assert word == smollm2_view.encode(" croissants").ids.tolist()


def test_a_special_token_in_the_bytes_is_not_taken_for_one(
    smollm2_view: TokenizerView,
) -> None:
    (found,) = spell(smollm2_view, [b"<|im_end|>"])
    assert found
    assert not smollm2_view.is_special[found].any()


def test_special_tokens_go_by_role_then_by_content(
    smollm2_view: TokenizerView, mistral_view: TokenizerView
) -> None:
    old = {token.content: i for i, token in smollm2_view.special.items()}
    new = {token.content: i for i, token in mistral_view.special.items()}
    found = row_sources(smollm2_view, mistral_view)
    assert found.row(new["<s>"]) == [old["<|im_start|>"]]
    assert found.row(new["</s>"]) == [old["<|endoftext|>"]]
    itself = row_sources(smollm2_view, smollm2_view)
    assert smollm2_view.special[old["<repo_name>"]].role is None
    assert itself.row(old["<repo_name>"]) == [old["<repo_name>"]]


def test_one_of_several_ids_with_the_same_bytes_has_their_row(
    smollm2_view: TokenizerView, mistral_view: TokenizerView
) -> None:
    """Mistral has `-` and the byte piece `<0x2D>`: equal rows share each prediction in half."""
    old, new = smollm2_view, mistral_view
    sources = row_sources(old, new)
    dash, byte_piece = preferred_ids(new)[b"-"], 3 + ord("-")
    assert new.token_bytes[dash] == new.token_bytes[byte_piece] == b"-"
    assert (sources.kind[dash], sources.row(dash)) == (SourceKind.COPIED, [preferred_ids(old)[b"-"]])
    assert (sources.kind[byte_piece], sources.row(byte_piece)) == (SourceKind.FRESH, [])
    copied = [
        old_id
        for i in np.flatnonzero(sources.kind == SourceKind.COPIED).tolist()
        for old_id in sources.row(i)
    ]
    assert len(copied) == len(set(copied))
    itself = row_sources(new, new)
    assert (itself.kind != SourceKind.FRESH).all()
