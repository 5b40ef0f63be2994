from __future__ import annotations

import pytest

from cdm_toolkit.vocab_map.keys import must_match, token_key


@pytest.mark.parametrize(
    ("data", "text", "stripped", "blanks"),
    [
        (b" the", "the", b"the", (" ", "")),
        (b"\n\tx \n", "x", b"x", ("\n\t", " \n")),
        ("\u3000中".encode(), "中", "中".encode(), ("\u3000", "")),
        (b" \xe4\xb8", None, b"\xe4\xb8", (" ", "")),
        (b"a b", "a b", b"a b", ("", "")),
        (b"   ", "", b"", ("", "   ")),
    ],
)
def test_strips_blanks_and_remembers_them(data, text, stripped, blanks):
    key = token_key(7, data, strip=True)
    assert (key.id, key.text, key.data, key.blanks) == (7, text, stripped, blanks)


def test_without_stripping_all_stays():
    key = token_key(0, b" x ", strip=False)
    assert (key.text, key.data, key.blanks) == (" x ", b" x ", ("", ""))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", "12"),
        ("x", ""),
        ("!=", "!="),
        ("٣", "٣"),
        ("½", "½"),
        ("a≤b", "≤"),
        ("NOT", "not"),
        ("now", ""),
        ("in", "in"),
    ],
)
def test_must_match_keeps_digits_and_operators(text, expected):
    assert must_match(text) == expected
