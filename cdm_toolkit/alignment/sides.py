"""One side of an alignment: its tokens, where they stand, and what they spell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from cdm_toolkit.errors import DoesNotSpell
from cdm_toolkit.tokdiff.spans import TokenSpans
from cdm_toolkit.tokdiff.vocabulary import Vocabulary

# Opens and closes the stand-in for a token that spells no bytes; never a byte of UTF-8.
_NOT_TEXT = b"\xff"


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """Tokens with byte ranges in a text that both sides share.

    `marker` tokens stand outside the text, at a place in it: special tokens that were added, and what a
    chat template adds. The text is one or more parts (the messages of a chat), and no group reaches from
    one into the next. `part` counts, non-decreasing, the parts that have ended before a token; `parts`
    holds their ends in bytes.
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
    def of(cls, spans: TokenSpans) -> Side:
        """Take the tokens of a text as it is: one part, and the zero-width special tokens as markers."""
        text, start, end, special = spans.text_bytes, spans.start, spans.end, spans.special
        marker = special & (start == end)
        part = (marker & (start == len(text))).astype(np.int64)
        return cls(spans.view, text, spans.ids, start, end, special, spans.exact, marker, part, (len(text),))

    def __len__(self) -> int:
        return len(self.ids)

    def roles(self, i: int) -> frozenset[str]:
        """Say what special token `i` is for, or its content if that is unknown; empty for other tokens."""
        token = self.view.special.get(int(self.ids[i]))
        if token is None:
            return frozenset()
        return token.roles or frozenset({token.role or f"the token {token.content}"})

    def spelled(self, first: int, last: int) -> list[bytes]:
        """Spell the tokens `[first, last)`, one by one; without bytes, a stand-in for the roles."""
        return [self._spelled(i) for i in range(first, last)]

    def _spelled(self, i: int) -> bytes:
        if self.exact[i] and not self.marker[i]:
            return self.text[self.start[i] : self.end[i]]
        if roles := self.roles(i):
            return _NOT_TEXT + "|".join(sorted(roles)).encode() + _NOT_TEXT
        return token_string(self.view, int(self.ids[i]))

    def same(self, t0: int, t1: int, s: Side, s0: int, s1: int) -> bool:
        """Tell whether tokens here and there spell the same bytes, or are two that share a role."""
        if t1 - t0 == s1 - s0 == 1 and self.roles(t0) & s.roles(s0):
            return True
        return b"".join(self.spelled(t0, t1)) == b"".join(s.spelled(s0, s1))


def token_string(view: Vocabulary, token_id: int) -> bytes:
    """Give a token's bytes, a special token's content: what edit distances are taken of."""
    if token_id in view.special:
        return view.special[token_id].content.encode()
    return view.token_bytes[token_id] or b""


def require_same_text(t: Side, s: Side) -> None:
    """Raise `DoesNotSpell` where the sides are spans of different texts; it names the first token that is."""
    if t.text == s.text:
        return
    shorter = min(len(t.text), len(s.text))
    differs = np.frombuffer(t.text, np.uint8)[:shorter] != np.frombuffer(s.text, np.uint8)[:shorter]
    place = int(differs.argmax()) if differs.any() else shorter
    token = min(int(np.searchsorted(s.end, place, side="right")), len(s) - 1)
    shown = s.view.token_text(int(s.ids[token])) if len(s) else "none"
    raise DoesNotSpell(s.view.name, max(token, 0), shown, t.text[place : place + 12])
