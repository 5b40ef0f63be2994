"""Alignments as a page, and as a picture for papers and slides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from cdm_toolkit.alignment.aligners import TextAlignment
from cdm_toolkit.cli.visible import token_label
from cdm_toolkit.pages import render
from cdm_toolkit.tokdiff.spans import TokenSpans


@dataclass(frozen=True, slots=True)
class Kind:
    """How groups of one kind are shown; each group also has its kind as text."""

    color: str
    """Of Okabe and Ito's palette, safe for colour-blind readers."""
    label_color: str
    """Of text on it."""
    meaning: str


KINDS = {
    "1-1": Kind("#009e73", "#ffffff", "one token on each side"),
    "1-n": Kind("#0072b2", "#ffffff", "one token above, several below"),
    "n-1": Kind("#e69f00", "#1b1f24", "several above, one below"),
    "n-m": Kind("#cc79a7", "#1b1f24", "several on both sides"),
}
UNMATCHED = {"unmatched": Kind("#d55e00", "#ffffff", "on one side only, such as a special token")}


@dataclass(frozen=True, slots=True)
class _Token:
    label: str
    about: str
    """Its id and bytes."""

    @property
    def text_width(self) -> float:
        """Fixed, so that the layout does not depend on the font; in pixels."""
        return 8.6 * cell_len(self.label)


@dataclass(frozen=True, slots=True)
class _Group:
    kind: str
    key: str
    """Of its colour: its kind, or `unmatched` where one side is empty."""
    inexact: bool
    """The two sides have different bytes."""
    upper: Sequence[_Token]
    lower: Sequence[_Token]


def alignment_page(alignments: Sequence[TextAlignment], *, source: str) -> str:
    """Render alignments as a page: two rows of tokens per text, groups coloured by kind, ids and bytes on hover."""
    names = _names(alignments[0])
    return render(
        "align.html.j2",
        title=f"{names[0]} above, {names[1]} below",
        source=source,
        names=names,
        texts=[list(_groups(aligned)) for aligned in alignments],
        kinds=KINDS | UNMATCHED,
    )


def _names(aligned: TextAlignment) -> tuple[str, str]:
    return aligned.t.view.name, aligned.s.view.name


def _groups(aligned: TextAlignment) -> Iterator[_Group]:
    for group in aligned.alignment:
        key = group.kind if group.kind in KINDS else "unmatched"
        inexact = not group.exact and key in KINDS
        upper = [_token(aligned.t, i) for i in range(group.t0, group.t1)]
        lower = [_token(aligned.s, i) for i in range(group.s0, group.s1)]
        yield _Group(group.kind, key, inexact, upper, lower)


def _token(spans: TokenSpans, index: int) -> _Token:
    token_id, start, end = int(spans.ids[index]), int(spans.start[index]), int(spans.end[index])
    data = spans.view.token_bytes[token_id]
    if data is None:
        special = spans.view.special.get(token_id)
        role = f", {special.role}" if special and special.role else ""
        about = f"id {token_id}, special{role}, at byte {start}"
    else:
        about = f"id {token_id}, bytes {data.hex(' ')}, [{start}, {end})"
    return _Token(token_label(spans.view, token_id), about)


# The same as SVG; lengths in pixels

_TOKEN_HEIGHT, _BAND, _GAP, _WIDTH, _TOP = 26, 22, 6, 1100, 40
_PADDING, _NARROWEST = 10, 30
_LINE = 2 * _TOKEN_HEIGHT + _BAND + 24


@dataclass(frozen=True, slots=True)
class _Placed:
    """A group in the picture; `tokens` have their left, top and width in it, and the width of their text."""

    group: _Group
    x: float
    y: int
    width: float
    tokens: Sequence[tuple[_Token, float, int, float, float]]


def alignment_svg(aligned: TextAlignment) -> str:
    """Render an alignment as SVG: two rows of tokens, a band for each group, ids and bytes as titles."""
    placed = list(_placed(aligned))
    last = placed[-1].y if placed else _TOP
    return render(
        "align.svg.j2",
        names=_names(aligned),
        groups=placed,
        lines=range(_TOP, last + 1, _LINE),
        width=_WIDTH,
        height=last + _LINE,
        token_height=_TOKEN_HEIGHT,
        band=_BAND,
        kinds=KINDS | UNMATCHED,
    )


def _placed(aligned: TextAlignment) -> Iterator[_Placed]:
    """Place groups from left to right, in a new line where one has no room."""
    left = 14 + max(_Token(name, "").text_width for name in _names(aligned))
    x, y = left, _TOP
    for group in _groups(aligned):
        width = max(_NARROWEST, *(sum(map(_natural_width, side)) for side in (group.upper, group.lower)))
        if x + width > _WIDTH and x > left:
            x, y = left, y + _LINE
        lower = _row(group.lower, width, _TOKEN_HEIGHT + _BAND)
        yield _Placed(group, x, y, width, [*_row(group.upper, width, 0), *lower])
        x += width + _GAP


def _row(tokens: Sequence[_Token], width: float, y: int) -> Iterator[tuple[_Token, float, int, float, float]]:
    """Stretch tokens to a width."""
    x, natural = 0.0, sum(map(_natural_width, tokens))
    for token in tokens:
        wide = _natural_width(token) * width / natural
        yield token, x, y, wide, token.text_width
        x += wide


def _natural_width(token: _Token) -> float:
    return token.text_width + _PADDING
