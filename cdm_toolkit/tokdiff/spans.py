"""Byte spans: the range of each token in the UTF-8 bytes of its text.

`spans_reference` defines the two rules token by token. Where the tokens' bytes are the bytes of the text, spans are
their running sum. Where the tokenizer changed the text, spans are the character offsets that it reports, refined
by the token bytes wherever these occur in the text. Known limit: after control characters that a SentencePiece
character map deletes at the very start of a text, the tokenizers library reports offsets that are too low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable
from unicodedata import category

import numpy as np
from jaxtyping import Bool, Int32, Int64

from cdm_toolkit.errors import DoesNotSpell, UnknownTokenId
from cdm_toolkit.tokdiff.vocabulary import Vocabulary

Positions = Int64[np.ndarray, " time"]
Flags = Bool[np.ndarray, " time"]
SpanArrays = tuple[Positions, Positions, Flags]


@runtime_checkable
class Encoding(Protocol):
    """What is read of a `tokenizers.Encoding`; offsets are in characters."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def offsets(self) -> list[tuple[int, int]]: ...
    @property
    def special_tokens_mask(self) -> list[int]: ...


@dataclass(frozen=True, slots=True, eq=False)
class TokenSpans:
    """The tokens of one text with their byte ranges `[start, end)`.

    `start` and `end` never decrease. The text can be cut after token i where `end[i] <= start[i + 1]`; tokens
    that together represent one normalized character all have the range of that character. Text between two
    tokens was dropped by the tokenizer.
    """

    view: Vocabulary
    text_bytes: bytes
    ids: Int32[np.ndarray, " time"]
    start: Positions
    end: Positions
    special: Flags
    """Special tokens: zero-width where the tokenizer added them, else the range of their literal in the text.
    An unk token that represents text is not special."""
    exact: Flags
    """Whether the token's bytes are `text_bytes[start:end]`, up to a dummy prefix; true for added special tokens."""

    def __len__(self) -> int:
        return len(self.ids)


def span_tokens(view: Vocabulary, text: str, text_bytes: bytes, encoding: Encoding) -> TokenSpans:
    """Place the tokens of an encoding in its text."""
    ids, added = encoding.ids, encoding.special_tokens_mask
    pieces = _pieces(view, ids, added)
    found = _running_sum(view, pieces, text_bytes)
    if found is None:
        found = _by_offsets(text, text_bytes, pieces, added, encoding.offsets, view.scheme.dummy_prefix)
    return _record(view, text_bytes, ids, found)


def span_ids(view: Vocabulary, text_bytes: bytes, ids: list[int]) -> TokenSpans | None:
    """Place given ids, for which there are no offsets; None where they do not spell the text.

    Special tokens count or do not, or only those at its ends do not.
    """
    special = view.is_special[ids].tolist() if ids else []
    for added in ([False] * len(ids), _outer(special), special):
        found = _running_sum(view, _pieces(view, ids, added), text_bytes)
        if found is not None:
            return _record(view, text_bytes, ids, found)
    return None


def spell_ids(view: Vocabulary, ids: Int32[np.ndarray, " time"], *, first: int = 0) -> TokenSpans:
    """Place the ids from the `first` on in the text that they spell; special tokens have no bytes of it.

    The text may begin or end within a character, as ids do that were cut. A blank that begins it is the tokenizer's own
    (its dummy prefix) where no text stands before. UnknownTokenId.
    """
    outside = ids[(ids < 0) | (ids >= view.vocab_size)]
    if len(outside):
        raise UnknownTokenId(view.name, int(outside[0]), view.vocab_size)
    is_special = view.is_special[ids]
    goes_on = not is_special[:first].all()
    ids = ids[first:]
    pieces = _pieces(view, ids.tolist(), is_special[first:].tolist())
    text_bytes = b"".join(pieces)
    if not goes_on:
        text_bytes = text_bytes.removeprefix(view.scheme.dummy_prefix)
    placed = _running_sum(view, pieces, text_bytes)
    assert placed is not None
    return _record(view, text_bytes, ids.tolist(), placed)


def _outer(special: list[bool]) -> list[bool]:
    """Mark the special tokens that no other token stands before, or none after."""
    if not any(special):
        return special
    return [all(special[: i + 1]) or all(special[i:]) for i in range(len(special))]


def does_not_spell(view: Vocabulary, text_bytes: bytes, ids: list[int]) -> DoesNotSpell:
    """Make the error that says which of the ids is the first that does not spell the text."""
    pieces = _pieces(view, ids, _outer(view.is_special[ids].tolist() if ids else []))
    at = 0
    for position, (token_id, piece) in enumerate(zip(ids, pieces, strict=True)):
        if not at:
            piece = (
                piece.removeprefix(view.scheme.dummy_prefix) if not text_bytes.startswith(piece) else piece
            )
        if not text_bytes.startswith(piece, at):
            token = view.token_text(token_id)
            return DoesNotSpell(view.name, position, token, text_bytes[at : at + max(len(piece), 1)])
        at += len(piece)
    return DoesNotSpell(view.name, len(ids), "after the last", text_bytes[at : at + 16])


def _record(view: Vocabulary, text_bytes: bytes, ids: list[int], placed: SpanArrays) -> TokenSpans:
    start, end, exact = placed
    id_array = np.array(ids, np.int32)
    return TokenSpans(view, text_bytes, id_array, start, end, view.is_special[id_array] & exact, exact)


def _pieces(view: Vocabulary, ids: list[int], added: Sequence[int]) -> list[bytes]:
    """Look the tokens' bytes up; special tokens that were added to the text have none."""
    pieces = list(map(view.literals.__getitem__, ids))
    return [b"" if a else p for p, a in zip(pieces, added, strict=True)] if any(added) else pieces


def _running_sum(view: Vocabulary, pieces: list[bytes], text_bytes: bytes) -> SpanArrays | None:
    """Place tokens that spell the text one after the other; None where they do not spell it."""
    spelled, dummy_prefix, dropped = b"".join(pieces), view.scheme.dummy_prefix, view.dropped_bytes
    kept = text_bytes.translate(None, dropped) if dropped else text_bytes
    prefix = 0
    if spelled != kept:
        prefix = len(dummy_prefix)
        if not prefix or spelled != dummy_prefix + kept:
            return None
    end = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces))) - prefix
    start = np.concatenate([np.zeros(1, np.int64), end])[:-1]
    start, end = np.maximum(start, 0), np.maximum(end, 0)
    if len(kept) == len(text_bytes):
        return start, end, np.ones(len(pieces), bool)
    kept_offsets = np.flatnonzero(~np.isin(np.frombuffer(text_bytes, np.uint8), list(dropped)))
    length, begin = end - start, np.append(kept_offsets, len(text_bytes))[start]
    end = np.where(length > 0, np.append(0, kept_offsets + 1)[end], begin)
    return begin, end, end - begin == length


def _by_offsets(
    text: str,
    text_bytes: bytes,
    pieces: list[bytes],
    added: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    dummy_prefix: bytes,
) -> SpanArrays:
    """Compute spans from reported character offsets, refined by the token bytes."""
    kept = np.flatnonzero(np.array(added) == 0)
    start, end, exact = (
        np.zeros(len(added), np.int64),
        np.zeros(len(added), np.int64),
        np.ones(len(added), bool),
    )
    if not len(kept):
        return start, end, exact
    start[kept[-1] + 1 :] = end[kept[-1] + 1 :] = len(text_bytes)
    characters = np.array(offsets, np.int64)[kept]
    first, last = _in_order(characters[:, 0], characters[:, 1])
    start[kept], end[kept], exact[kept] = _clusters(
        text, text_bytes, [pieces[i] for i in kept.tolist()], first, last, dummy_prefix
    )
    return start, end, exact


def _clusters(
    text: str, text_bytes: bytes, pieces: list[bytes], first: Positions, last: Positions, dummy_prefix: bytes
) -> SpanArrays:
    """Compute the spans of clusters, runs of tokens whose reported characters overlap.

    A cluster whose bytes occur in the text gets spans by its bytes, any other the reported ones. `first`, `last`:
    each token's characters `[first, last)`.
    """
    to_byte = _byte_positions(text_bytes)
    start, end, exact = to_byte[first], to_byte[last], np.ones(len(pieces), bool)
    lows, highs = [*start.tolist(), len(text_bytes)], end.tolist()
    done = 0
    for a, b in pairwise([0, *(np.flatnonzero(start[1:] >= end[:-1]) + 1).tolist(), len(pieces)]):
        low, high = lows[a], highs[b - 1]
        spelled = pieces[a] if b == a + 1 else b"".join(pieces[a:b])
        at = floor = _locate(text_bytes, spelled, low, high, done, lows[b])
        if at is None and dummy_prefix and spelled.startswith(dummy_prefix):
            rest = spelled[len(dummy_prefix) :]
            floor = _locate(text_bytes, rest, low, high, done, lows[b])
            # The rest must cover all reported bytes: the dummy prefix itself has none.
            if floor is not None and floor <= low and high <= floor + len(rest):
                at = floor - len(dummy_prefix)
        if at is None or floor is None:
            dummy = pieces[a] == dummy_prefix != text_bytes[low : low + 1] and b > a + 1
            end[a] = low if dummy else end[a]
            exact[a + dummy : b] = False
            done = high
            continue
        for i in range(a, b):
            start[i] = max(at, floor)
            at += len(pieces[i])
            end[i] = max(at, floor)
        done = at
    if not exact.all():
        start, end = _whole_characters(text, to_byte, first, last, start, end, ~exact)
    ordered = _in_order(start, end)
    return *ordered, exact & (start == ordered[0]) & (end == ordered[1])


def _in_order(start: Positions, end: Positions) -> tuple[Positions, Positions]:
    """Widen ranges so that starts and ends never decrease."""
    return np.minimum.accumulate(start[::-1])[::-1], np.maximum.accumulate(end)


def _locate(text_bytes: bytes, spelled: bytes, low: int, high: int, done: int, following: int) -> int | None:
    """Find the offset of bytes that are reported in `[low, high)`; the report may leave out leading blanks."""
    size = len(spelled)
    if high - size >= done and text_bytes.startswith(spelled, high - size):
        return high - size
    if low + size <= following and text_bytes.startswith(spelled, low):
        return low
    return None


def _whole_characters(
    text: str,
    to_byte: Int64[np.ndarray, " boundary"],
    first: Positions,
    last: Positions,
    start: Positions,
    end: Positions,
    changed: Flags,
) -> tuple[Positions, Positions]:
    """Widen changed tokens to whole combining sequences, the unit within which normalization moves bytes."""
    points, index = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
    joins = np.array([_joins(chr(point)) for point in points.tolist()], bool)[index]
    joins[:1] = False
    borders = np.append(np.flatnonzero(~joins), len(text))
    low = borders[np.searchsorted(borders, first, side="right") - 1]
    high = borders[np.searchsorted(borders, last, side="left")]
    return np.where(changed, np.minimum(to_byte[low], start), start), np.where(changed, to_byte[high], end)


def _joins(character: str) -> bool:
    """Check whether a character can combine with the ones before it: marks, jamo, half-width voicing marks."""
    return category(character)[0] == "M" or "\u1160" <= character <= "\u11ff" or character in "\uff9e\uff9f"


def _byte_positions(text_bytes: bytes) -> Int64[np.ndarray, " boundary"]:
    """Return the byte offset of each character, and of the end of the text."""
    begins = (np.frombuffer(text_bytes, np.uint8) & 0xC0) != 0x80
    return np.append(np.flatnonzero(begins), len(text_bytes)).astype(np.int64)
