"""Spans cover the text, and mark where a tokenizer changed it."""

from __future__ import annotations

from unicodedata import category

import numpy as np
import pytest
from hypothesis import given

from cdm_toolkit.errors import BadText, DoesNotSpell, UnknownTokenId
from cdm_toolkit.tokdiff.spans_reference import reference_spans

from .conftest import MADE, texts

# These spell every text that has no ▁ and no decomposed marks; the others change or drop some.
LOSSLESS = ("llama3", "gpt2", "deepseek", "gemma2", "mistral", "llama2", "opt")
CHANGING = ("qwen2", "smollm2", "mistral", "phi3-like", *MADE)


@pytest.fixture(scope="session")
def get_view(real_view, made_view, phi3_like_view):
    def get(name):
        if name == "phi3-like":
            return phi3_like_view
        return made_view(name) if name in MADE else real_view(name)

    return get


def rows(spans):
    """Write spans down as (token, start, end)."""
    names = [spans.view.token_text(i) for i in spans.ids.tolist()]
    return list(zip(names, spans.start.tolist(), spans.end.tolist(), strict=True))


def joined(spans):
    return b"".join(spans.text_bytes[a:b] for a, b in zip(spans.start, spans.end, strict=True))


def check(view, text, *, add_special_tokens):
    """Check the spans of a text against the reference and the invariants of spans."""
    spans = view.encode(text, add_special_tokens=add_special_tokens)
    encoding = view.backend.encode(text, add_special_tokens=add_special_tokens)
    literals = [view.literals[i] for i in encoding.ids]
    reference = reference_spans(
        text,
        literals,
        encoding.special_tokens_mask,
        encoding.offsets,
        view.scheme.dummy_prefix,
        view.dropped_bytes,
    )
    assert list(zip(spans.start.tolist(), spans.end.tolist(), spans.exact.tolist(), strict=True)) == reference
    assert spans.ids.tolist() == encoding.ids
    assert (np.diff(spans.start) >= 0).all()
    assert (np.diff(spans.end) >= 0).all()
    assert (spans.start <= spans.end).all()
    assert spans.start.min(initial=0) >= 0
    assert spans.end.max(initial=0) <= len(text.encode())
    for literal, start, end, exact, special in zip(
        literals, spans.start.tolist(), spans.end.tolist(), spans.exact, spans.special, strict=True
    ):
        if exact and not (special and start == end):
            assert spans.text_bytes[start:end] in (literal, literal.removeprefix(view.scheme.dummy_prefix))
    return spans


def uncovered(spans):
    """Give the characters of which some byte belongs to no token."""
    covered = np.zeros(len(spans.text_bytes), bool)
    for start, end in zip(spans.start, spans.end, strict=True):
        covered[start:end] = True
    text = spans.text_bytes.decode()
    at = np.cumsum([0, *(len(char.encode()) for char in text)])
    return [char for i, char in enumerate(text) if not covered[at[i] : at[i + 1]].all()]


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=texts)
def test_cover_any_text_of_a_lossless_tokenizer(get_view, name, text):
    view = get_view(name)
    plain = text.replace("▁", "_")
    assert joined(check(view, plain, add_special_tokens=True)) == plain.encode()


@pytest.mark.parametrize("name", CHANGING)
@given(text=texts)
def test_agree_with_the_definition_on_any_text(get_view, name, text):
    check(get_view(name), text, add_special_tokens=False)
    check(get_view(name), text, add_special_tokens=True)


@pytest.mark.parametrize("name", ["qwen2", "mistral", "roberta-like", "phi3-like"])
@given(text=texts)
def test_leave_nothing_uncovered_where_only_characters_change(get_view, name, text):
    assert all(char.isspace() for char in uncovered(check(get_view(name), text, add_special_tokens=True)))


@pytest.mark.parametrize("name", ["unigram", "t5-like", "plain-bpe"])
@given(text=texts)
def test_leave_only_blanks_uncovered_where_blanks_are_lost(get_view, name, text):
    assert all(char.isspace() for char in uncovered(check(get_view(name), text, add_special_tokens=False)))


@pytest.mark.parametrize(("name", "dropped"), [("wordpiece", "CMZ"), ("xlmr-like", "CZ")])
@given(text=texts)
def test_leave_only_what_the_normalizer_deletes_uncovered(get_view, name, dropped, text):
    if name == "xlmr-like":
        text = f"a{text}"  # tokenizers' Precompiled reports wrong offsets behind what it deletes at the front
    spans = check(get_view(name), text, add_special_tokens=False)
    # ▁ is a blank to SentencePiece, and is dropped as one where several are adjacent
    assert all(category(char)[0] in dropped or char == "▁" for char in uncovered(spans))


def test_cover_gsm8k_with_every_real_tokenizer(any_view, gsm8k_rows):
    rows_of_text = [text for row in gsm8k_rows[:200] for text in (row["question"], row["answer"])]
    for text, spans in zip(rows_of_text, any_view.encode_batch(rows_of_text), strict=True):
        assert joined(spans) == text.encode()
        assert spans.exact.all()


def test_follow_the_definition_on_many_scripts(any_view, multilingual):
    for text in multilingual:
        check(any_view, text, add_special_tokens=True)


def test_encode_batch_equals_encode(any_view, multilingual):
    for text, spans in zip(multilingual, any_view.encode_batch(multilingual), strict=True):
        assert rows(spans) == rows(any_view.encode(text))


# What tokenizers do to a text, case by case


def test_nfc_shares_the_composed_character_among_its_tokens(qwen2_view):
    text = "xe\u0301y"
    spans = qwen2_view.encode(text)
    inside = [(a, b) for _, a, b in rows(spans)]
    assert (spans.start[0], spans.end[-1]) == (0, len(text.encode()))
    assert not spans.exact.all()
    assert all(a <= 1 or a >= 4 for a, _ in inside), "no token starts between the letter and its mark"
    assert all(b <= 1 or b >= 4 for _, b in inside)


def test_nfc_that_reorders_marks_keeps_the_sequence_together(qwen2_view):
    spans = qwen2_view.encode("a\u0315\u0300")  # becomes à\u0315
    assert set(zip(spans.start.tolist(), spans.end.tolist(), strict=True)) == {(0, 5)}
    assert not spans.exact.any()


def test_half_characters_are_split_by_their_bytes_even_where_the_text_changes_elsewhere(qwen2_view):
    spans = qwen2_view.encode("e\u0301 \U0001f9ff")
    last = [(a, b) for _, a, b in rows(spans) if a >= 3]
    assert last[0][0] == 3
    assert [b for _, b in last[:-1]] == [a for a, _ in last[1:]]
    assert len(last) > 1, "the emoji is to be in several tokens"
    assert spans.exact[-len(last) :].all()


def test_dummy_prefix_takes_no_bytes(llama2_view):
    assert rows(llama2_view.encode("hello")) == [(" hell", 0, 4), ("o", 4, 5)]
    assert rows(llama2_view.encode("你")) == [(" ", 0, 0), ("你", 0, 3)]
    assert rows(llama2_view.encode("  x")) == [("  ", 0, 1), (" x", 1, 3)]
    assert llama2_view.encode("  x").exact.all()


def test_dummy_prefix_behind_a_special_token_takes_no_bytes(llama2_view):
    spans = llama2_view.encode("a</s> foo")
    assert rows(spans) == [(" a", 0, 1), ("</s>", 1, 5), (" ", 5, 5), (" foo", 5, 9)]
    assert spans.special.tolist() == [False, True, False, False]
    assert spans.exact.all()


def test_a_mark_in_the_text_is_no_blank(llama2_view):
    spans = llama2_view.encode("a▁▁b")
    assert [(a, b) for _, a, b in rows(spans)] == [(0, 1), (1, 4), (4, 8)]
    assert spans.exact.tolist() == [True, False, False]


def test_smollm2_drops_bytes_that_it_has_no_token_for(smollm2_view):
    assert 0x1D in smollm2_view.dropped_bytes
    spans = smollm2_view.encode("a\x1db")
    assert rows(spans) == [("a", 0, 1), ("b", 2, 3)]
    assert spans.exact.all()


def test_wordpiece_loses_blanks_case_and_accents(made_view):
    spans = made_view("wordpiece").encode("  The  fÓx ")
    assert spans.start[0] == 2
    assert uncovered(spans) == [" "] * 5
    assert spans.exact[(spans.start == 2) & (spans.end == 3)].sum() == 0, "t is not T"


def test_an_unk_token_covers_the_unknown_text(made_view):
    view = made_view("unigram")
    spans = view.encode("a\u4f60b")
    (at,) = np.flatnonzero(spans.ids == view.backend.token_to_id("<unk>"))
    assert (spans.start[at], spans.end[at]) == (1, 4)
    assert not spans.special[at]
    assert not spans.exact[at]


def test_a_literal_unk_in_the_text_is_special(llama2_view):
    spans = llama2_view.encode("<unk>a")
    assert rows(spans)[0] == ("<unk>", 0, 5)
    assert spans.special.tolist() == [True, False]


def test_blanks_that_a_marker_swallows_belong_to_nothing(phi3_like_view):
    spans = phi3_like_view.encode("hi<|end|>\n<|user|> yo")
    assert [row for row in rows(spans) if row[0].startswith("<|")] == [
        ("<|end|>", 2, 9),
        ("<|user|>", 10, 18),
    ]
    assert spans.exact.all()


def test_added_special_tokens_are_zero_width_at_both_ends(made_view, llama3_view):
    spans = made_view("wordpiece").encode("the fox", add_special_tokens=True)
    assert rows(spans)[0] == ("[CLS]", 0, 0)
    assert rows(spans)[-1] == ("[SEP]", 7, 7)
    assert spans.special[[0, -1]].all()
    assert rows(llama3_view.encode("hi", add_special_tokens=True)) == [
        ("<|begin_of_text|>", 0, 0),
        ("hi", 0, 2),
    ]


def test_special_tokens_in_the_text_take_their_literals_bytes(llama3_view):
    spans = llama3_view.encode("<|begin_of_text|>hi<|eot_id|>", add_special_tokens=True)
    assert rows(spans)[:2] == [("<|begin_of_text|>", 0, 0), ("<|begin_of_text|>", 0, 17)]
    assert spans.special.tolist() == [True, True, False, True]


@pytest.mark.parametrize("text", ["", "\0", "\r\n", "\t\t", " ", "\ufeff", "\U0010ffff"])
def test_small_texts(any_view, text):
    spans = check(any_view, text, add_special_tokens=False)
    if not any_view.dropped_bytes:
        assert joined(spans) == text.encode()


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2"])
def test_a_megabyte_on_one_line(real_view, name):
    text = "word 12, naïve 你好 \U0001f600 " * 36_000
    spans = real_view(name).encode(text)
    assert len(spans.text_bytes) > 1_000_000
    assert joined(spans) == spans.text_bytes


def test_lone_surrogates_are_refused(qwen2_view):
    with pytest.raises(BadText, match=r"U\+D800 at character 2"):
        qwen2_view.encode("ab\ud800")
    with pytest.raises(BadText):
        qwen2_view.encode_batch(["fine", "\udfff"])


# Spans of given ids


def test_spans_of_own_ids_are_those_of_the_text(any_view, multilingual):
    for text in multilingual:
        for add_special_tokens in (False, True):
            spans = any_view.encode(text, add_special_tokens=add_special_tokens)
            assert rows(any_view.spans_of(text, spans.ids.tolist())) == rows(spans)


def test_spans_of_another_segmentation(llama3_view):
    ids = [llama3_view.backend.token_to_id(char) for char in "hello"]
    bos, eot = 128000, 128009
    spans = llama3_view.spans_of("hello", [bos, *ids, eot])
    assert spans.start.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert (
        llama3_view.spans_of("hello", [*ids[:2], eot, *ids[2:]]).special.tolist()
        == [False] * 2 + [True] + [False] * 3
    )


def test_ids_that_do_not_spell_the_text_are_refused(llama3_view, mistral_view):
    ids = llama3_view.encode("the cat").ids.tolist()
    with pytest.raises(DoesNotSpell, match=r"token 1 \( cat\) stands where the text has b' dog'"):
        llama3_view.spans_of("the dog", ids)
    with pytest.raises(DoesNotSpell, match=r"token 2 \(after the last\)"):
        llama3_view.spans_of("the cat!", ids)
    with pytest.raises(DoesNotSpell):
        mistral_view.spans_of("the dog", mistral_view.encode("the cat").ids.tolist())


@pytest.mark.parametrize("token_id", [-1, 128_256])
def test_ids_outside_the_vocabulary_are_refused(llama3_view, token_id):
    with pytest.raises(UnknownTokenId, match=f"the id {token_id} is not in the vocabulary of llama3"):
        llama3_view.spans_of("a", [token_id])
