"""What edit distance compares of a token: its characters or bytes, and its digits and operators."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

from cdm_toolkit.tokdiff.view import TokenizerView

OPERATORS = frozenset("+-*/%=<>!&|^~")
FREE_ASCII = re.compile(r"[^0-9+\-*/%=<>!&|^~]+")
WORD_OPERATORS = frozenset({"and", "or", "not", "in", "is"})


class TokenKey(NamedTuple):
    """A token as edit distance compares it.

    `text` is None where the bytes are not valid UTF-8. `must_match` are its digits and operators. `blanks` are the
    whitespace stripped from its start and end.
    """

    id: int
    text: str | None
    data: bytes
    must_match: str
    blanks: tuple[str, str]


def token_keys(view: TokenizerView, *, strip: bool) -> list[TokenKey]:
    """Return the keys of all ordinary, non-empty tokens, in order of id; special tokens have none.

    `strip` removes leading and trailing Unicode whitespace, and with it the word marks (`Ġ`, `▁`), which are spaces
    in token bytes.
    """
    keys = (token_key(i, data, strip=strip) for i, data in enumerate(view.token_bytes) if data is not None)
    return [key for key in keys if key.data]


def token_key(token_id: int, data: bytes, *, strip: bool) -> TokenKey:
    """Return the key of one token's bytes.

    >>> token_key(0, b" x1=", strip=True)
    TokenKey(id=0, text='x1=', data=b'x1=', must_match='1=', blanks=(' ', ''))
    """
    # Invalid UTF-8 becomes lone surrogates, which are neither whitespace nor digit nor operator.
    text = data.decode("utf-8", "surrogateescape")
    kept = text.strip() if strip else text
    start = text.find(kept)
    whole = kept.isascii() or not any("\udc80" <= char <= "\udcff" for char in kept)
    return TokenKey(
        token_id,
        kept if whole else None,
        kept.encode("utf-8", "surrogateescape"),
        must_match(kept),
        (text[:start], text[start + len(kept) :]),
    )


def must_match(text: str) -> str:
    """Return what must be equal for two tokens to be matched by distance: their digits and operators, in order.

    A word that is an operator itself (`not`, `in`) must be the same word.

    >>> must_match("x12<=y"), must_match(" Not"), must_match("note")
    ('12<=', 'not', '')
    """
    word = text.strip().lower()
    if word in WORD_OPERATORS:
        return word
    if text.isascii():
        return FREE_ASCII.sub("", text)
    return "".join(char for char in text if _is_digit_or_operator(char))


@lru_cache(maxsize=1 << 16)
def _is_digit_or_operator(char: str) -> bool:
    return char in OPERATORS or unicodedata.category(char) in {"Nd", "Nl", "No", "Sm"}
