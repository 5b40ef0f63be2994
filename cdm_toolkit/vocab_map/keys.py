"""What edit distance compares of a token: its characters or bytes, with or without blanks, and its guard."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from cdm_toolkit.tokdiff.view import TokenizerView

OPERATORS = frozenset("+-*/%=<>!&|^~")
UNGUARDED_ASCII = re.compile(r"[^0-9+\-*/%=<>!&|^~]+")
WORD_OPERATORS = frozenset({"and", "or", "not", "in", "is"})


class TokenKey(NamedTuple):
    """Hold one token as edit distance sees it; `text` is None where the bytes are not whole characters."""

    id: int
    text: str | None
    data: bytes
    guard: str
    blanks: tuple[str, str]


def token_keys(view: TokenizerView, *, strip: bool) -> list[TokenKey]:
    """Give the key of each ordinary token that is not empty, in order of id; special tokens have none.

    `strip` takes leading and trailing Unicode blanks away, and with them the word marks, which token bytes
    already spell as blanks.
    """
    keys = (token_key(i, data, strip=strip) for i, data in enumerate(view.token_bytes) if data is not None)
    return [key for key in keys if key.data]


def token_key(token_id: int, data: bytes, *, strip: bool) -> TokenKey:
    """Give the key of one token's bytes.

    >>> token_key(0, b" x1=", strip=True)
    TokenKey(id=0, text='x1=', data=b'x1=', guard='1=', blanks=(' ', ''))
    """
    # Bytes that are no characters become lone surrogates, which are neither blank nor digit nor operator.
    text = data.decode("utf-8", "surrogateescape")
    kept = text.strip() if strip else text
    start = text.find(kept)
    whole = kept.isascii() or not any("\udc80" <= char <= "\udcff" for char in kept)
    return TokenKey(
        token_id,
        kept if whole else None,
        kept.encode("utf-8", "surrogateescape"),
        guard(kept),
        (text[:start], text[start + len(kept) :]),
    )


def guard(text: str) -> str:
    """Give what two tokens must share to be matched by distance: their digits and operators, in order.

    A word that is an operator itself (`not`, `in`) must be the same word.

    >>> guard("x12<=y"), guard(" Not"), guard("note")
    ('12<=', 'not', '')
    """
    word = text.strip().lower()
    if word in WORD_OPERATORS:
        return word
    if text.isascii():
        return UNGUARDED_ASCII.sub("", text)
    return "".join(char for char in text if _guarded(char))


@lru_cache(maxsize=1 << 16)
def _guarded(char: str) -> bool:
    return char in OPERATORS or unicodedata.category(char) in {"Nd", "Nl", "No", "Sm"}


def guard_codes(keys: Iterable[TokenKey], known: dict[str, int], *, match_digits: bool) -> list[int]:
    """Number the guards (digits and operators); calls that share `known` number alike. All 0 without `match_digits`."""
    return [known.setdefault(key.guard, len(known)) if match_digits else 0 for key in keys]
