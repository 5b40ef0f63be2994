"""Hand-made and random token sequences, including spans that no tokenizer would report."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import strategies as st

from cdm_toolkit.tokdiff.spans import TokenSpans
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.tokdiff.vocabulary import SpecialToken

ROLES = ("bos", "eos", "turn_start", "turn_end", "header_start")


class MadeView(TokenizerView):
    """A view with a vocabulary but no tokenizer backend."""

    def __init__(
        self, name: str, vocabulary: tuple[bytes | None, ...], special: dict[int, SpecialToken]
    ) -> None:
        literals = tuple(b"" if token is None else token for token in vocabulary)
        for attribute, value in (
            ("name", name), ("token_bytes", vocabulary), ("special", special), ("literals", literals)
        ):  # fmt: skip
            object.__setattr__(self, attribute, value)


@dataclass
class Tokens:
    """Builder for a token sequence: one call per token."""

    text: bytes
    name: str = "made"
    rows: list[tuple[int, int, int, bool, bool]] = field(default_factory=list)
    vocabulary: list[bytes | None] = field(default_factory=list)
    special: dict[int, SpecialToken] = field(default_factory=dict)

    def token(self, start: int, end: int, spelled: bytes | None = None) -> Tokens:
        exact = spelled is None
        token = self.text[start:end] if spelled is None else spelled
        if token not in self.vocabulary:
            self.vocabulary.append(token)
        self.rows.append((self.vocabulary.index(token), start, end, False, exact))
        return self

    def dummy(self, start: int) -> Tokens:
        """A piece that is a dummy prefix alone: no bytes of the text, and exact."""
        self.token(start, start, b" ")
        self.rows[-1] = (*self.rows[-1][:4], True)
        return self

    def special_token(
        self, start: int, role: str | None, end: int | None = None, content: str = ""
    ) -> Tokens:
        end = start if end is None else end
        content = content or f"<|{role}|>"
        found = [i for i, token in self.special.items() if (token.role, token.content) == (role, content)]
        if not found:
            self.special[len(self.vocabulary)] = SpecialToken(len(self.vocabulary), content, role)
            found = [len(self.vocabulary)]
            self.vocabulary.append(None)
        self.rows.append((found[0], start, end, True, True))
        return self

    def spans(self) -> TokenSpans:
        view = MadeView(self.name, tuple(self.vocabulary), dict(self.special))
        ids, start, end, special, exact = np.array(self.rows, np.int64).reshape(-1, 5).T
        return TokenSpans(
            view, self.text, ids.astype(np.int32), start.copy(), end.copy(), special == 1, exact == 1
        )


@st.composite
def token_spans(draw: st.DrawFn, text: bytes, *, honest: bool = False) -> TokenSpans:
    """Cut a text at any bytes; unless `honest`, change, merge, drop and add tokens too."""
    tokens = Tokens(text, name=draw(st.sampled_from(["a", "b"])))
    cuts = draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12)) if text else set()
    _specials(draw, tokens, 0)
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)] if text else []
    for a, b in pairwise(edges):
        kind = (
            "exact"
            if honest
            else draw(st.sampled_from(["exact"] * 6 + ["changed", "several", "dropped", "odd"]))
        )
        if kind == "exact":
            tokens.token(a, b)
        elif kind == "changed":
            tokens.token(a, b, text[a:b].upper())
        elif kind == "several":  # one stretch of text, changed, by tokens that overlap
            spelled = draw(st.sampled_from([text[a:b], text[a:b].upper(), b"xy"]))
            at = draw(st.integers(0, len(spelled)))
            tokens.token(a, b, spelled[:at]).token(a, b, spelled[at:])
        elif kind == "odd":
            draw(st.sampled_from([tokens.dummy, lambda at: tokens.token(at, at, b"z")]))(a)
            tokens.token(a, b)
            if draw(st.booleans()):
                _specials(draw, tokens, b)
    _specials(draw, tokens, len(text))
    return tokens.spans()


def _specials(draw: st.DrawFn, tokens: Tokens, at: int) -> None:
    for role in draw(st.lists(st.sampled_from(ROLES), max_size=2)):
        tokens.special_token(at, role)


texts = st.text(st.sampled_from("aab é한🙂\u0301"), max_size=24).map(str.encode)


@pytest.fixture(scope="session")
def spans_of_one_text() -> st.SearchStrategy[tuple[TokenSpans, TokenSpans]]:
    return texts.flatmap(lambda text: st.tuples(token_spans(text), token_spans(text)))


@pytest.fixture(scope="session")
def honest_spans() -> st.SearchStrategy[tuple[TokenSpans, TokenSpans]]:
    return texts.flatmap(
        lambda text: st.tuples(token_spans(text, honest=True), token_spans(text, honest=True))
    )


@st.composite
def renderings(
    draw: st.DrawFn,
) -> tuple[TokenSpans, list[tuple[int, int]], TokenSpans, list[tuple[int, int]]]:
    """Put the same contents into two texts, between other bytes."""
    contents = draw(st.lists(st.text("aé ", max_size=8).map(str.encode), max_size=3))
    made: list[object] = []
    for _ in "ts":
        text, pieces = draw(st.sampled_from([b"", b"[A]", b"user\n"])), []
        for content in contents:
            pieces.append((len(text), len(text) + len(content)))
            text += content + draw(st.sampled_from([b"", b"\n", b"[/A] ", b"<|x|>"]))
        made += [draw(token_spans(text)), pieces]
    return tuple(made)  # type: ignore[return-value]


@pytest.fixture(scope="session")
def two_renderings() -> st.SearchStrategy[
    tuple[TokenSpans, list[tuple[int, int]], TokenSpans, list[tuple[int, int]]]
]:
    return renderings()


@pytest.fixture(scope="session")
def write() -> type[Tokens]:
    return Tokens


@pytest.fixture(scope="session")
def views(real_view) -> dict[str, TokenizerView]:
    """One real tokenizer of each family and more."""
    return {name: real_view(name) for name in ("llama3", "qwen2", "gpt2", "mistral", "deepseek", "smollm2")}
