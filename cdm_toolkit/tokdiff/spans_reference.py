"""Reference implementation of byte spans in plain Python; `spans` must give the same result.

1. Where the joined token bytes are the text (or a dummy prefix and the text), each token starts where the one
   before it ends. Bytes that the vocabulary has no token for, and so drops, are skipped.
2. Else each token covers the characters that the tokenizer reports. Tokens that share characters form a cluster.
   A cluster whose bytes occur in the text gets consecutive spans by its bytes: ending at the reported end if they
   match there (a tokenizer may leave out leading blanks), else starting at the reported start, else on all of the
   reported bytes with its first blank taken as a dummy prefix.
3. A cluster whose bytes do not occur in the text was changed. Each of its tokens covers whole characters with their
   combining marks; a dummy prefix that is a token of its own at its start is zero-width.
4. Special tokens that the tokenizer added are zero-width, before or after the text.
5. Starts and ends never decrease, and the reported ones neither: a token is widened for this, and is then no longer
   exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import category

Span = tuple[int, int, bool]
"""Start and end in bytes, and whether these are the token's bytes."""


def reference_spans(
    text: str,
    pieces: Sequence[bytes],
    added: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    dummy_prefix: bytes,
    dropped: bytes = b"",
) -> list[Span]:
    """Compute the span of each token of a text.

    `pieces`: the bytes of each token, the content of a special token. `added`: 1 for special tokens that are not
    in the text. `offsets`: reported characters `[first, last)`. `dropped`: bytes that no token has.
    """
    whole = text.encode()
    own = [b"" if is_added else piece for piece, is_added in zip(pieces, added, strict=True)]
    kept_offsets = [i for i, byte in enumerate(whole) if byte not in dropped]
    for prefix in (b"", dummy_prefix):
        if b"".join(own) == prefix + bytes(whole[i] for i in kept_offsets):
            among_kept = one_after_the_other(own, -len(prefix), 0)
            return [_in_whole_text(span, kept_offsets, len(whole)) for span in among_kept]
    kept = [i for i, is_added in enumerate(added) if not is_added]
    spans = _by_characters(text, [own[i] for i in kept], [offsets[i] for i in kept], dummy_prefix)
    by_index = dict(zip(kept, spans, strict=True))
    behind = [i > kept[-1] if kept else False for i in range(len(own))]
    return [
        by_index.get(i, (len(whole), len(whole), True) if behind[i] else (0, 0, True))
        for i in range(len(own))
    ]


def one_after_the_other(pieces: Sequence[bytes], at: int, floor: int) -> list[Span]:
    """Give pieces consecutive spans from `at` on, clipped to start at `floor`."""
    spans = []
    for piece in pieces:
        spans.append((max(at, floor), max(at + len(piece), floor), True))
        at += len(piece)
    return spans


def _in_whole_text(span: Span, kept_offsets: Sequence[int], size: int) -> Span:
    """Map a range of the kept bytes, which are at `kept_offsets`, to a range of the text."""
    start, end, _ = span
    low = kept_offsets[start] if start < len(kept_offsets) else size
    high = kept_offsets[end - 1] + 1 if end > start else low
    return low, high, high - low == end - start


def _by_characters(
    text: str, pieces: Sequence[bytes], offsets: Sequence[tuple[int, int]], dummy_prefix: bytes
) -> list[Span]:
    whole = text.encode()

    def byte(character: int) -> int:
        return len(text[:character].encode())

    def located(spelled: bytes) -> int | None:
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
        if (at := located(spelled)) is not None:
            spans += one_after_the_other(own, at, at)
            done = at + len(spelled)
        elif (
            prefix is not None
            and (at := located(spelled.removeprefix(prefix))) is not None
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
    """Widen characters `[first, last)` to combining sequences: a letter with its marks, a syllable with its jamo."""
    while 0 < first < len(text) and joins(text[first]):
        first -= 1
    while 0 < last < len(text) and joins(text[last]):
        last += 1
    return first, last


def joins(character: str) -> bool:
    """Check whether normalization can combine a character with the ones before it."""
    return category(character)[0] == "M" or "\u1160" <= character <= "\u11ff" or character in "\uff9e\uff9f"


def in_order(spans: Sequence[Span]) -> list[Span]:
    """Widen spans so that starts and ends never decrease."""
    ordered = []
    for i, (start, end, exact) in enumerate(spans):
        low = min(later[0] for later in spans[i:])
        high = max(earlier[1] for earlier in spans[: i + 1])
        ordered.append((low, high, exact and (low, high) == (start, end)))
    return ordered
