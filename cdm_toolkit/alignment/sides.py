"""One side of an alignment: the tokens of the teacher or the student, their byte ranges and their bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from cdm_toolkit.errors import DoesNotSpell
from cdm_toolkit.tokdiff.spans import TokenSpans
from cdm_toolkit.tokdiff.vocabulary import Vocabulary

# Delimits the placeholder for a special token, which has no bytes; 0xFF never occurs in UTF-8.
_NOT_TEXT = b"\xff"


@dataclass(frozen=True, slots=True, eq=False)
class AlignmentSide:
    """Tokens with byte ranges in a text that both sides share.

    `marker` tokens are not part of the text but have a byte offset in it: added special tokens, and the text
    of a chat template. The text has one or more parts (the messages of a chat), and no group spans two parts.
    `part` is the number of parts that end before each token (non-decreasing); `parts` holds the end of each
    part in bytes.
    """

    view: Vocabulary
    text: bytes
    ids: Int[np.ndarray, " time"]
    start: Int[np.ndarray, " time"]
    end: Int[np.ndarray, " time"]
    special: Bool[np.ndarray, " time"]
    exact: Bool[np.ndarray, " time"]
    marker: Bool[np.ndarray, " time"]
    part: Int[np.ndarray, " time"]
    parts: tuple[int, ...]

    @classmethod
    def of(cls, spans: TokenSpans) -> AlignmentSide:
        """Use a whole text as one part, with its zero-width special tokens as markers."""
        text, start, end, special = spans.text_bytes, spans.start, spans.end, spans.special
        marker = special & (start == end)
        part = (marker & (start == len(text))).astype(np.int64)
        return cls(spans.view, text, spans.ids, start, end, special, spans.exact, marker, part, (len(text),))

    def __len__(self) -> int:
        return len(self.ids)

    def roles(self, i: int) -> frozenset[str]:
        """Return the roles of special token `i`, or its content if it has none; empty for other tokens."""
        token = self.view.special.get(int(self.ids[i]))
        if token is None:
            return frozenset()
        return token.roles or frozenset({token.role or f"the token {token.content}"})

    def spelled(self, first: int, last: int) -> list[bytes]:
        """Return the bytes of each token in `[first, last)`; for special tokens a placeholder with their roles."""
        return [self._spelled(i) for i in range(first, last)]

    def _spelled(self, i: int) -> bytes:
        if self.exact[i] and not self.marker[i]:
            return self.text[self.start[i] : self.end[i]]
        if roles := self.roles(i):
            return _NOT_TEXT + "|".join(sorted(roles)).encode() + _NOT_TEXT
        return token_string(self.view, int(self.ids[i]))

    def same(self, t0: int, t1: int, s: AlignmentSide, s0: int, s1: int) -> bool:
        """Check whether the tokens of both sides have the same bytes, or are two special tokens that share a role."""
        if t1 - t0 == s1 - s0 == 1 and self.roles(t0) & s.roles(s0):
            return True
        return b"".join(self.spelled(t0, t1)) == b"".join(s.spelled(s0, s1))


def token_string(view: Vocabulary, token_id: int) -> bytes:
    """Give a token's bytes, a special token's content: what edit distances are taken of."""
    if token_id in view.special:
        return view.special[token_id].content.encode()
    return view.token_bytes[token_id] or b""


def require_same_text(t: AlignmentSide, s: AlignmentSide) -> None:
    """Raise `DoesNotSpell` where the sides are of different texts; it names the first token that differs."""
    if t.text == s.text:
        return
    shorter = min(len(t.text), len(s.text))
    differs = np.frombuffer(t.text, np.uint8)[:shorter] != np.frombuffer(s.text, np.uint8)[:shorter]
    offset = int(differs.argmax()) if differs.any() else shorter
    token = min(int(np.searchsorted(s.end, offset, side="right")), len(s) - 1)
    shown = s.view.token_text(int(s.ids[token])) if len(s) else "none"
    raise DoesNotSpell(s.view.name, max(token, 0), shown, t.text[offset : offset + 12])
