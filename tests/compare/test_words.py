"""Words and digits by their bytes: the same for every tokenizer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.compare.words import digit_bits, digit_bytes, predicted_words, word_ranges

TEXTS = st.text(st.sampled_from("ab1 \n9.é漢"), max_size=30).map(str.encode)


def cut(text: bytes, ends: set[int]) -> np.ndarray:
    """Cut a text into tokens that end at these bytes."""
    bounds = sorted({end for end in ends if end < len(text)} | {0, len(text)})
    return np.array(list(pairwise(bounds)), np.int64).reshape(-1, 2)


@given(TEXTS, st.integers(0, 5))
def test_words_are_those_of_split_with_the_blanks_before(text: bytes, start: int) -> None:
    words = word_ranges(text, start)
    assert [text[a:b].strip() for a, b in words] == text[start:].split()
    assert all(b == c for (_, b), (c, _) in pairwise(words.tolist()))


@given(TEXTS, st.sets(st.integers(1, 30)), st.sets(st.integers(1, 30)))
def test_all_or_none_predicted_is_the_same_for_every_tokenizer(
    text: bytes, ends: set[int], others: set[int]
) -> None:
    words = word_ranges(text)
    for tokens in (cut(text, ends), cut(text, others)):
        assert predicted_words(words, tokens, np.ones(len(tokens), bool)) == len(words)
        assert predicted_words(words, tokens, np.zeros(len(tokens), bool)) == 0


@given(TEXTS, st.sets(st.integers(1, 30)), st.data())
def test_a_word_is_predicted_when_each_token_with_a_byte_of_it_is(
    text: bytes, ends: set[int], data: st.DataObject
) -> None:
    tokens, words = cut(text, ends), word_ranges(text)
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))), bool)
    by_hand = sum(
        all(ok for (a, b), ok in zip(tokens, right, strict=True) if set(range(a, b)) & set(range(*word)))
        for word in words.tolist()
    )
    assert predicted_words(words, tokens, right) == by_hand


def test_a_token_over_two_words_counts_for_both() -> None:
    text = b"end.\n\nThe"
    words, tokens = word_ranges(text), np.array([[0, 3], [3, 6], [6, 9]])
    assert predicted_words(words, tokens, np.array([True, False, True])) == 0
    assert predicted_words(words, tokens, np.array([True, True, False])) == 1


def test_a_token_without_bytes_changes_nothing() -> None:
    words, tokens = word_ranges(b"abc"), np.array([[0, 1], [1, 1], [1, 3]])
    assert predicted_words(words, tokens, np.array([True, False, True])) == 1


def test_digits_are_those_of_the_completion() -> None:
    text, tokens = b"12 is 3.", np.array([[0, 2], [2, 7], [7, 8]])
    bits = np.array([1.0, 2.0, 4.0])
    assert (digit_bytes(text), digit_bits(text, tokens, bits)) == (3, 3.0)
    assert (digit_bytes(text, 2), digit_bits(text, tokens, bits, 2)) == (1, 2.0)
    assert (digit_bytes(text, 7), digit_bits(text, tokens, bits, 7)) == (0, 0.0)


@given(TEXTS, st.sets(st.integers(1, 30)))
def test_digits_by_single_bytes_are_a_lower_bound(text: bytes, ends: set[int]) -> None:
    """Where every byte costs a bit, longer tokens can only cost more."""
    tokens = cut(text, ends)
    bits = (tokens[:, 1] - tokens[:, 0]).astype(float)
    assert digit_bits(text, tokens, bits) >= digit_bytes(text)
    singles = cut(text, set(range(len(text))))
    assert digit_bits(text, singles, np.ones(len(singles))) == digit_bytes(text)
