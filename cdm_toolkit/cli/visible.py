"""Display of tokens: whitespace, control characters and partial UTF-8 made visible."""

from __future__ import annotations

import unicodedata

from rich.cells import cell_len

from cdm_toolkit.tokdiff.vocabulary import Vocabulary

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\0": "␀", "\xa0": "⍽"}
# Joiners and variation selectors have no width and would be invisible, or combine with the frame.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_COMBINING = {"Mn", "Me", "Mc"}


def visible(data: bytes) -> str:
    """Make all bytes visible: ␣ for a space, ⏎ for a line feed, \\xe2 for a byte of an incomplete character.

    >>> visible(b" caf\\xc3\\xa9\\n"), visible(b"\\xe2\\x82"), visible(b"")
    ('␣café⏎', '\\\\xe2\\\\x82', '∅')
    """
    if not data:
        return "∅"
    text = data.decode("utf-8", "backslashreplace")
    shown = [_mark(character) for character in text]
    # A combining mark needs a base character.
    if unicodedata.category(text[0]) in _COMBINING:
        shown.insert(0, "◌")
    return "".join(shown)


def _mark(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    category = unicodedata.category(character)
    if category in _HIDDEN:
        return f"‹{ord(character):04X}›"
    return "␣" if category == "Zs" else character


def token_label(view: Vocabulary, token_id: int) -> str:
    """Return what a viewer shows for an id: its bytes made visible, or a special token's name."""
    data = view.token_bytes[token_id]
    if data is not None:
        return visible(data)
    special = view.special.get(token_id)
    return special.content if special else f"‹id {token_id}›"


def padded(text: str, cells: int) -> str:
    """Pad a text with spaces to a number of terminal cells."""
    return text + " " * (cells - cell_len(text))
