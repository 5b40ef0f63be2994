"""Words and digits of a text, and what a model's tokens say of them: measures that compare across tokenizers. Pure.

Both are defined by the bytes of the text, so that every tokenizer is asked for the same words and the same digits; a
token that reaches beyond one counts in full, so that a tokenizer's longer tokens are never an advantage.
"""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Bool, Float64, Int64

Ranges = Int64[np.ndarray, "_ 2"]
"""Byte ranges `[start, end)`, one a row."""

_WORD = re.compile(rb"\s*\S+")
_DIGITS = np.frombuffer(b"0123456789", np.uint8)


def word_ranges(text: bytes, start: int = 0) -> Ranges:
    """Find the words from byte `start` on: each with all ASCII white space before it.

    >>> word_ranges(b"7 + 8 =\\n\\n15 ", 1).tolist()
    [[1, 3], [3, 5], [5, 7], [7, 11]]
    """
    found = [match.span() for match in _WORD.finditer(text, start)]
    return np.array(found, np.int64).reshape(-1, 2)


def predicted_words(words: Ranges, tokens: Ranges, is_argmax: Bool[np.ndarray, " token"]) -> int:
    """Count the words whose every token is the model's argmax: each token that has a byte of the word.

    >>> words = word_ranges(b"a bc d")
    >>> predicted_words(words, np.array([[0, 1], [1, 3], [3, 4], [4, 6]]), np.array([True, True, False, True]))
    2
    """
    wrong = tokens[~is_argmax & (tokens[:, 0] < tokens[:, 1])]
    shares = (wrong[:, None, 0] < words[:, 1]) & (wrong[:, None, 1] > words[:, 0])
    return len(words) - int(shares.any(0).sum())


def digit_bytes(text: bytes, start: int = 0) -> int:
    """Count the ASCII digits from byte `start` on.

    >>> digit_bytes(b"7 + 8 = 15", 1)
    3
    """
    return int(_is_digit(text)[start:].sum())


def digit_bits(text: bytes, tokens: Ranges, bits: Float64[np.ndarray, " token"], start: int = 0) -> float:
    """Sum the bits of the tokens that have an ASCII digit from byte `start` on; other bytes in them change nothing.

    >>> digit_bits(b"is 15.", np.array([[0, 2], [2, 4], [4, 5], [5, 6]]), np.array([1.0, 2.0, 4.0, 8.0]))
    6.0
    """
    before = np.append(0, np.cumsum(_is_digit(text)))
    begin, end = np.maximum(tokens, start).T
    return float(bits[before[end] > before[begin]].sum())


def _is_digit(text: bytes) -> Bool[np.ndarray, " byte"]:
    return np.isin(np.frombuffer(text, np.uint8), _DIGITS)
