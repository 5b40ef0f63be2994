"""What spans are: the readable definition that `spans` must agree with. One page, plain Python, slow.

1. Where the tokens' bytes, joined, are the text (or a dummy blank and the text), each token stands where the
   one before it ends. Bytes that the vocabulary cannot spell, and so drops, are skipped.
2. Else each token stands on the characters that the tokenizer reports. Tokens that share characters form a
   cluster. A cluster whose bytes are the text's own is placed by its bytes, one token after the other: where
   the reported end allows it (a tokenizer may leave leading blanks out), else at the reported start, else
   all of the reported bytes with its first blank taken for a dummy prefix.
3. A cluster with other bytes than the text was changed. Its tokens stand on whole characters with the marks
   that belong to them, together; a lone dummy blank at its front stands on nothing.
4. Special tokens that the tokenizer added stand on nothing: before the text, or after it.
5. Starts and ends never decrease, the reported ones neither: a token is widened for this, and is then no
   longer exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import category

Span = tuple[int, int, bool]
"""Start and end in bytes, and whether the token's bytes stand there."""


def reference_spans(
    text: str,
    pieces: Sequence[bytes],
    added: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    dummy_prefix: bytes,
    dropped: bytes = b"",
) -> list[Span]:
    """Place the tokens of a text.

    `pieces`: the bytes of each, a special token's content. `added`: 1 for special tokens that the text does
    not have. `offsets`: reported characters `[first, last)`. `dropped`: bytes that no token spells.
    """
    whole = text.encode()
    own = [b"" if is_added else piece for piece, is_added in zip(pieces, added, strict=True)]
    places = [i for i, byte in enumerate(whole) if byte not in dropped]
    for prefix in (b"", dummy_prefix):
        if b"".join(own) == prefix + bytes(whole[i] for i in places):
            among_kept = one_after_the_other(own, -len(prefix), 0)
            return [_unskipped(span, places, len(whole)) for span in among_kept]
    kept = [i for i, is_added in enumerate(added) if not is_added]
    spans = _by_characters(text, [own[i] for i in kept], [offsets[i] for i in kept], dummy_prefix)
    placed = dict(zip(kept, spans, strict=True))
    behind = [i > kept[-1] if kept else False for i in range(len(own))]
    return [
        placed.get(i, (len(whole), len(whole), True) if behind[i] else (0, 0, True)) for i in range(len(own))
    ]


def one_after_the_other(pieces: Sequence[bytes], at: int, floor: int) -> list[Span]:
    """Place pieces from `at` on, nothing before `floor`."""
    spans = []
    for piece in pieces:
        spans.append((max(at, floor), max(at + len(piece), floor), True))
        at += len(piece)
    return spans


def _unskipped(span: Span, places: Sequence[int], size: int) -> Span:
    """Turn a range among the bytes that were kept, at `places`, into one of the text."""
    start, end, _ = span
    low = places[start] if start < len(places) else size
    high = places[end - 1] + 1 if end > start else low
    return low, high, high - low == end - start


def _by_characters(
    text: str, pieces: Sequence[bytes], offsets: Sequence[tuple[int, int]], dummy_prefix: bytes
) -> list[Span]:
    whole = text.encode()

    def byte(character: int) -> int:
        return len(text[:character].encode())

    def placed(spelled: bytes) -> int | None:
        back = high - len(spelled)
        if back >= done and whole[back:high] == spelled:
            return back
        fits = low + len(spelled) <= following and whole[low : low + len(spelled)] == spelled
        return low if fits else None

    reported = in_order([(first, last, True) for first, last in offsets])
    clusters: list[list[int]] = []
    for i, (first, _, _) in enumerate(reported):
        if clusters and first < reported[i - 1][1]:
            clusters[-1].append(i)
        else:
            clusters.append([i])
    spans: list[Span] = []
    done = 0
    for number, cluster in enumerate(clusters):
        low, high = byte(reported[cluster[0]][0]), byte(reported[cluster[-1]][1])
        following = byte(reported[clusters[number + 1][0]][0]) if number + 1 < len(clusters) else len(whole)
        own = [pieces[i] for i in cluster]
        spelled = b"".join(own)
        prefix = dummy_prefix if dummy_prefix and spelled.startswith(dummy_prefix) else None
        if (at := placed(spelled)) is not None:
            spans += one_after_the_other(own, at, at)
            done = at + len(spelled)
        elif (
            prefix is not None
            and (at := placed(spelled.removeprefix(prefix))) is not None
            and at <= low
            and high <= at + len(spelled) - len(prefix)
        ):
            spans += one_after_the_other(own, at - len(prefix), at)
            done = at + len(spelled) - len(prefix)
        else:
            for i in cluster:
                first, last = whole_characters(text, *reported[i][:2])
                spans.append((byte(first), byte(last), False))
            if len(cluster) > 1 and own[0] == dummy_prefix != whole[low : low + 1]:
                spans[-len(cluster)] = (low, low, True)
            done = high
    return in_order(spans)


def whole_characters(text: str, first: int, last: int) -> tuple[int, int]:
    """Widen characters `[first, last)` to whole ones: a letter with its marks, a syllable with its jamo."""
    while 0 < first < len(text) and joins(text[first]):
        first -= 1
    while 0 < last < len(text) and joins(text[last]):
        last += 1
    return first, last


def joins(character: str) -> bool:
    """Say whether normalization can make a character one with those before it."""
    return category(character)[0] == "M" or "\u1160" <= character <= "\u11ff" or character in "\uff9e\uff9f"


def in_order(spans: Sequence[Span]) -> list[Span]:
    """Widen spans until starts and ends never decrease."""
    ordered = []
    for i, (start, end, exact) in enumerate(spans):
        low = min(later[0] for later in spans[i:])
        high = max(earlier[1] for earlier in spans[: i + 1])
        ordered.append((low, high, exact and (low, high) == (start, end)))
    return ordered
