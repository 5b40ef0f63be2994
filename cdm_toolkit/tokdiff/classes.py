"""The class of a piece of text: what kind of characters it is made of."""

from __future__ import annotations

from functools import lru_cache
from unicodedata import category

CLASSES = ("letters", "digits", "blanks", "punctuation", "CJK", "emoji", "other")

_CJK = ((0x1100, 0x11FF), (0x2E80, 0x303F), (0x3040, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF))
_CJK_MORE = ((0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0xFF65, 0xFFDC), (0x20000, 0x3FFFF))
_EMOJI = ((0x1F000, 0x1FAFF), (0x2600, 0x27BF), (0x2B00, 0x2BFF), (0x231A, 0x231B), (0x23E9, 0x23FA))
# Joins, varies or counts as part of the emoji or letter that it stands at
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
    """Name the class that most characters of a text or token have, blanks counted only where all are.

    A tie goes to the class that comes first. Bytes that are no text are "other", as is None, a special token.

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
