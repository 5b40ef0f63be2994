"""The vocabulary of a tokenizer: the bytes of each id, and what special tokens are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from cdm_toolkit.errors import UnknownTokenId
from cdm_toolkit.tokdiff.token_bytes import Scheme


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """Hold a special token; `role` is the primary one of its `roles`, None where none is known."""

    id: int
    content: str
    role: str | None
    roles: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """Hold what each id of a tokenizer stands for."""

    name: str
    family: str
    token_bytes: tuple[bytes | None, ...] = field(repr=False)
    """Index: id. None for special tokens and for ids that no token has."""
    special: Mapping[int, SpecialToken] = field(repr=False)
    fingerprint: str
    """sha256 of whatever changes bytes, ids, roles or splitting; neither name nor truncation nor padding."""
    scheme: Scheme
    literals: tuple[bytes, ...] = field(repr=False)
    """What each id looks like in a text: as `token_bytes`, with the content of special tokens."""
    is_special: Bool[np.ndarray, " vocab"] = field(repr=False)
    dropped_bytes: bytes = b""
    """What a byte-level vocabulary has no token for: the tokenizer leaves it out of a text without a word."""

    @property
    def vocab_size(self) -> int:
        """Count the ids, unused ones among them."""
        return len(self.token_bytes)

    def token_text(self, token_id: int) -> str:
        """Show a token: its text, with bytes that are no text as `\\xe2`; the content of a special token."""
        if not 0 <= token_id < self.vocab_size:
            raise UnknownTokenId(self.name, token_id, self.vocab_size)
        return self.literals[token_id].decode("utf-8", errors="backslashreplace")
