"""Classes of text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.tokdiff.classes import CLASSES, class_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "letters"),
        ("naïve", "letters"),
        ("हिन्दी", "letters"),
        (b" 2024", "digits"),
        ("½", "digits"),
        ("  \n", "blanks"),
        ("\u3000", "blanks"),
        (" ==", "punctuation"),
        ("€", "punctuation"),
        ("你好", "CJK"),
        ("カナ", "CJK"),
        ("한국", "CJK"),
        ("👩\u200d👧", "emoji"),
        ("❤\ufe0f", "emoji"),
        ("\x00", "other"),
        ("", "other"),
        (b"\xf0\x9f", "other"),
        (None, "other"),
        ("a1", "letters"),
        ("x12", "digits"),
    ],
)
def test_class_of(text, expected):
    assert class_of(text) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_has_a_class_and_its_bytes_the_same(text):
    assert class_of(text) in CLASSES
    assert class_of(text.encode()) == class_of(text)
