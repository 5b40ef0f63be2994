"""Draw an alignment on a terminal as two rows of tokens, readable without colour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from cdm_toolkit.alignment.aligners import TextAlignment
from cdm_toolkit.alignment.groups import Group
from cdm_toolkit.cli.visible import padded, token_label
from cdm_toolkit.tokdiff.spans import TokenSpans

KIND_STYLES = {"1-1": "green", "1-n": "cyan", "n-1": "blue", "n-m": "magenta"}
UNMATCHED_STYLE = "red"


@dataclass(frozen=True, slots=True)
class _Block:
    """One group as a column: the tokens of both sides and the kind between them."""

    upper: str
    middle: str
    lower: str
    style: str

    @property
    def width(self) -> int:
        return max(cell_len(self.upper), cell_len(self.middle), cell_len(self.lower))


def draw_rows(aligned: TextAlignment, *, width: int) -> Iterator[Text]:
    """Yield the lines of the drawing, wrapped to the width: three lines and a blank one for each part.

    `│` separates groups, `·` the tokens of one group; `≈` before a kind means that the two sides have different
    bytes.
    """
    names = (aligned.t.view.name, aligned.s.view.name)
    margin = max(cell_len(name) for name in names) + 1
    blocks = [_block(aligned, group) for group in aligned.alignment]
    for line in _wrap(blocks, width - margin - 1):
        for name, part in ((names[0], "upper"), ("", "middle"), (names[1], "lower")):
            text = Text(padded(name, margin), style="bold", end="")
            text.append("│", style="dim")
            for block in line:
                cell = getattr(block, part)
                if part == "middle":
                    left = (block.width - cell_len(cell)) // 2
                    cell = " " * left + cell
                style = f"dim {block.style}" if part == "middle" else block.style
                text.append(f" {padded(cell, block.width)} ", style=style)
                text.append("│", style="dim")
            yield text
        yield Text("")


def _block(aligned: TextAlignment, group: Group) -> _Block:
    return _Block(
        upper=_side(aligned.t, group.t0, group.t1),
        middle=group.kind
        if group.exact or 0 in (group.t1 - group.t0, group.s1 - group.s0)
        else f"≈{group.kind}",
        lower=_side(aligned.s, group.s0, group.s1),
        style=KIND_STYLES.get(group.kind, UNMATCHED_STYLE),
    )


def _side(spans: TokenSpans, begin: int, end: int) -> str:
    return " · ".join(token_label(spans.view, int(token_id)) for token_id in spans.ids[begin:end])


def _wrap(blocks: list[_Block], width: int) -> Iterator[list[_Block]]:
    line: list[_Block] = []
    used = 0
    for block in blocks:
        cells = block.width + 3
        if line and used + cells > width:
            yield line
            line, used = [], 0
        line.append(block)
        used += cells
    if line:
        yield line
