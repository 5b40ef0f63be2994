"""Classify text by its characters: letters, digits, blanks and so on."""

from __future__ import annotations

from functools import lru_cache
from unicodedata import category

CLASSES = ("letters", "digits", "blanks", "punctuation", "CJK", "emoji", "other")

_CJK = ((0x1100, 0x11FF), (0x2E80, 0x303F), (0x3040, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF))
_CJK_MORE = ((0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0xFF65, 0xFFDC), (0x20000, 0x3FFFF))
_EMOJI = ((0x1F000, 0x1FAFF), (0x2600, 0x27BF), (0x2B00, 0x2BFF), (0x231A, 0x231B), (0x23E9, 0x23FA))
# Joiners, variation selectors and the enclosing keycap: part of the emoji or letter before them
_JOINERS = frozenset("\u200c\u200d\ufe0e\ufe0f\u20e3")


@lru_cache(maxsize=1 << 16)
def class_of_character(character: str) -> str:
    """Name the class of one character."""
    code, kind = ord(character), category(character)
    if character.isspace():
        return "blanks"
    if any(low <= code <= high for low, high in (*_CJK, *_CJK_MORE)):
        return "CJK"
    if any(low <= code <= high for low, high in _EMOJI) or character in _JOINERS:
        return "emoji"
    if kind[0] in "LM":
        return "letters"
    if kind[0] == "N":
        return "digits"
    return "punctuation" if kind[0] in "PS" else "other"


def class_of(text: str | bytes | None) -> str:
    """Return the most frequent class of a text's or token's characters; blanks count only if there is nothing else.

    Ties go to the first of `CLASSES`. Invalid UTF-8 is "other", and so is None (a special token).

    >>> class_of(" the"), class_of(b" 12"), class_of("\\n\\n"), class_of("你好!"), class_of(b"\\xe2\\x96")
    ('letters', 'digits', 'blanks', 'CJK', 'other')
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            return "other"
    if not text:
        return "other"
    counts = dict.fromkeys(CLASSES, 0)
    for character in text:
        counts[class_of_character(character)] += 1
    if counts["blanks"] < len(text):
        counts["blanks"] = 0
    return max(CLASSES, key=counts.__getitem__)
