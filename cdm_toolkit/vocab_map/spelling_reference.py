"""Reference implementation of `spelling.py`, one string at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import preferred_ids
from cdm_toolkit.vocab_map.static_reference import exact_reference


def spellings_reference(view: TokenizerView, by: TokenizerView) -> list[list[int]]:
    """Return the tokens that spell each id: one where bytes or role are equal, none for other special tokens."""
    exact = exact_reference(view, by)
    return [
        [exact[token_id]] if token_id in exact else spelling_reference(by, data) if data else []
        for token_id, data in enumerate(view.token_bytes)
    ]


def spelling_reference(view: TokenizerView, data: bytes) -> list[int]:
    """Spell bytes with the tokenizer's own encoding, else with the best of all possible spellings."""
    try:
        own: list[int] = view.encode(data.removeprefix(view.scheme.dummy_prefix).decode()).ids.tolist()
    except UnicodeDecodeError:
        own = []
    if b"".join(view.token_bytes[token_id] or b"" for token_id in own) == data:
        return own
    return fewest_tokens_reference(data, preferred_ids(view))


def fewest_tokens_reference(data: bytes, ids: Mapping[bytes, int]) -> list[int]:
    """Try every way to spell bytes: the fewest tokens, then the longest first, second, ..."""
    ways = list(_spellings(data, ids))
    best = min(ways, key=lambda way: (len(way), [-len(token) for token in way]), default=[])
    return [ids[token] for token in best]


def _spellings(data: bytes, ids: Mapping[bytes, int]) -> Iterator[list[bytes]]:
    if not data:
        yield []
    for end in range(1, len(data) + 1):
        if data[:end] in ids:
            yield from ([data[:end], *rest] for rest in _spellings(data[end:], ids))
