"""Self-contained HTML pages and SVG: one file, no external resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.cells import cell_len

from cdm_toolkit.alignment.aligners import TextAlignment
from cdm_toolkit.alignment.groups import Group
from cdm_toolkit.cli.visible import token_label
from cdm_toolkit.tokdiff.spans import TokenSpans

# Okabe-Ito palette, safe for colour-blind readers. Each group also shows its kind as text.
KIND_COLOURS = {
    "1-1": "#009e73",
    "1-n": "#0072b2",
    "n-1": "#e69f00",
    "n-m": "#cc79a7",
    "unmatched": "#d55e00",
}
_LABEL_INK = {"1-1": "#ffffff", "1-n": "#ffffff", "n-1": "#1b1f24", "n-m": "#1b1f24", "unmatched": "#ffffff"}
KIND_MEANINGS = {
    "1-1": "one token on each side",
    "1-n": "one token above, several below",
    "n-1": "several above, one below",
    "n-m": "several on both sides",
    "unmatched": "on one side only, such as a special token",
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #66707b; --paper: #ffffff; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #8b949e; --paper: #0d1117; --line: #30363d; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1200px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
.facts, .faint { color: var(--faint); } .facts { margin-top: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; padding: 0; list-style: none; font-size: .85rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em;
            background: var(--kind); }
.rows { display: flex; flex-wrap: wrap; gap: .7rem .35rem; padding-left: 0; align-items: stretch; }
.side-names { display: grid; grid-template-rows: 1fr auto 1fr; font-size: .8rem; color: var(--faint);
              padding-right: .4rem; align-items: center; }
.group { display: grid; grid-template-rows: 1fr auto 1fr; border-radius: 5px; overflow: hidden;
         border: 1px solid var(--kind); background: color-mix(in srgb, var(--kind) 9%, transparent); }
.group.inexact { border-style: dashed; border-width: 2px; }
.side { display: flex; justify-content: center; min-height: 1.7em; }
.token { font: 14px/1.7 ui-monospace, "DejaVu Sans Mono", monospace; padding: 0 .35em; white-space: pre;
         flex: 1 0 auto; text-align: center; }
.token + .token { border-left: 1px solid color-mix(in srgb, var(--kind) 50%, transparent); }
.token:hover, .token:focus { outline: none; background: color-mix(in srgb, var(--kind) 35%, transparent); }
.kind { font-size: .65rem; line-height: 1.3; text-align: center; color: var(--label); background: var(--kind);
        padding: 0 .4em; }
table { border-collapse: collapse; font-size: .9rem; } th, td { padding: .25rem .8rem .25rem 0; text-align: left;
        border-bottom: 1px solid var(--line); vertical-align: top; }
td.figure, th.figure { text-align: right; font-variant-numeric: tabular-nums; }
code, .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
svg { display: block; margin: 1rem 0; } svg text { fill: currentColor; }
"""


def html_page(title: str, facts: str, body: str, *, style: str = "") -> str:
    """Wrap a body in a self-contained page; `style` goes over the style that all pages have."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="facts">{escape(facts)}</p>\n{body}\n</body>\n</html>\n'
    )


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, figures: Iterable[int] = ()) -> str:
    """Render a table, with escaped cells; `figures` are the right-aligned columns."""
    right = set(figures)

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="figure">{escape(value)}</{tag}>'
            if i in right
            else f"<{tag}>{escape(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    lines = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{cells('th', columns)}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table>\n"


def bar_chart(
    title: str, bars: Sequence[tuple[str, float, str]], *, colours: Sequence[str], unit: str = ""
) -> str:
    """Render horizontal bars as inline SVG; a bar is (label, value, value as text), the longest fills the width."""
    longest = max((value for _, value, _ in bars), default=0.0) or 1.0
    label_width = 14 + max((7.5 * cell_len(label) for label, _, _ in bars), default=0.0)
    width, height = label_width + 480, 24 * len(bars) + 34
    parts = [
        f'<svg role="img" aria-label="{escape(title)}" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-family="system-ui, sans-serif" font-size="13">',
        f'<text x="0" y="14" font-weight="600">{escape(title)}{f" ({escape(unit)})" if unit else ""}</text>',
    ]
    for i, (label, value, figure) in enumerate(bars):
        y, length = 28 + 24 * i, 360 * value / longest
        parts.append(
            f'<text x="{label_width - 8:.0f}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{label_width:.0f}" y="{y}" width="{length:.1f}" height="17" rx="2" '
            f'fill="{colours[i % len(colours)]}"/>'
            f'<text x="{label_width + length + 6:.1f}" y="{y + 13}">{escape(figure)}</text>'
        )
    return "".join(parts) + "</svg>\n"


def alignment_page(alignments: Sequence[TextAlignment], *, source: str) -> str:
    """Render alignments as a page: two rows of tokens per text, groups coloured by kind, ids and bytes on hover."""
    first = alignments[0]
    body = [_legend()]
    for number, aligned in enumerate(alignments, start=1):
        if len(alignments) > 1:
            body.append(f"<h2>{number}</h2>")
        body.append(_html_rows(aligned))
    return html_page(
        f"{first.t.view.name} above, {first.s.view.name} below",
        f"From {source}. Hover over a token for its id and bytes. A dashed frame: the two sides have different bytes.",
        "\n".join(body),
    )


def _legend() -> str:
    items = "".join(
        f'<li style="--kind: {colour}"><i></i>{kind}: {KIND_MEANINGS[kind]}</li>'
        for kind, colour in KIND_COLOURS.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _html_rows(aligned: TextAlignment) -> str:
    names = (
        f'<div class="side-names"><span>{escape(aligned.t.view.name)}</span><span></span>'
        f"<span>{escape(aligned.s.view.name)}</span></div>"
    )
    return f'<div class="rows">{names}{"".join(_html_group(aligned, group) for group in aligned.alignment)}</div>'


def _html_group(aligned: TextAlignment, group: Group) -> str:
    def side(spans: TokenSpans, begin: int, end: int) -> str:
        tokens = "".join(
            f'<span class="token" tabindex="0" title="{escape(_hover(spans, i))}">'
            f"{escape(token_label(spans.view, int(spans.ids[i])))}</span>"
            for i in range(begin, end)
        )
        return f'<div class="side">{tokens}</div>'

    key = colour_key(group)
    inexact = "" if group.exact or key == "unmatched" else " inexact"
    return (
        f'<div class="group{inexact}" style="--kind: {KIND_COLOURS[key]}; --label: {_LABEL_INK[key]}">'
        f"{side(aligned.t, group.t0, group.t1)}"
        f'<div class="kind">{"≈ " if inexact else ""}{group.kind}</div>'
        f"{side(aligned.s, group.s0, group.s1)}</div>"
    )


def colour_key(group: Group) -> str:
    """Return the key of a group's colour: its kind, or `unmatched` where one side is empty."""
    return group.kind if group.kind in KIND_COLOURS else "unmatched"


def _hover(spans: TokenSpans, index: int) -> str:
    token_id, start, end = int(spans.ids[index]), int(spans.start[index]), int(spans.end[index])
    data = spans.view.token_bytes[token_id]
    if data is None:
        special = spans.view.special.get(token_id)
        role = f", {special.role}" if special and special.role else ""
        return f"id {token_id}, special{role}, at byte {start}"
    return f"id {token_id}, bytes {data.hex(' ')}, [{start}, {end})"


# The same as SVG, for papers and slides. Text widths are fixed, so that the layout does not depend on the font.

_CELL, _TOKEN_HEIGHT, _BAND, _GAP, _SVG_WIDTH = 8.6, 26, 22, 6, 1100


def alignment_svg(aligned: TextAlignment) -> str:
    """Render an alignment as SVG: two rows of tokens, a band for each group, ids and bytes as titles."""
    name_width = 14 + _CELL * max(cell_len(aligned.t.view.name), cell_len(aligned.s.view.name))
    x, y = name_width, 40.0
    drawn: list[str] = []
    line_height = 2 * _TOKEN_HEIGHT + _BAND + 24
    drawn.append(_svg_names(aligned, y))
    for group in aligned.alignment:
        upper = [_svg_token_width(aligned.t, i) for i in range(group.t0, group.t1)]
        lower = [_svg_token_width(aligned.s, i) for i in range(group.s0, group.s1)]
        width = max(sum(upper), sum(lower), 30.0)
        if x + width > _SVG_WIDTH and x > name_width:
            x, y = name_width, y + line_height
            drawn.append(_svg_names(aligned, y))
        drawn.append(_svg_group(aligned, group, x, y, width, upper, lower))
        x += width + _GAP
    height = y + line_height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_SVG_WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {_SVG_WIDTH} {height:.0f}" font-family="DejaVu Sans Mono, ui-monospace, monospace" '
        f'font-size="13">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        f"{_svg_legend()}\n" + "\n".join(drawn) + "\n</svg>\n"
    )


def _svg_names(aligned: TextAlignment, y: float) -> str:
    return (
        f'<text x="6" y="{y + 17:.0f}" fill="#57606a">{escape(aligned.t.view.name)}</text>'
        f'<text x="6" y="{y + _TOKEN_HEIGHT + _BAND + 17:.0f}" fill="#57606a">{escape(aligned.s.view.name)}</text>'
    )


def _svg_token_width(spans: TokenSpans, index: int) -> float:
    return _CELL * cell_len(token_label(spans.view, int(spans.ids[index]))) + 10


def _svg_group(
    aligned: TextAlignment,
    group: Group,
    x: float,
    y: float,
    width: float,
    upper: list[float],
    lower: list[float],
) -> str:
    key = colour_key(group)
    colour = KIND_COLOURS[key]
    inexact = not group.exact and key != "unmatched"
    dash = ' stroke-dasharray="4 3"' if inexact else ""
    band_top, band_end = y + _TOKEN_HEIGHT, y + _TOKEN_HEIGHT + _BAND
    parts = [
        f'<rect x="{x:.1f}" y="{band_top:.1f}" width="{width:.1f}" height="{_BAND}" fill="{colour}" opacity="0.85"/>',
        f'<text x="{x + width / 2:.1f}" y="{band_top + 15:.1f}" text-anchor="middle" font-size="11" '
        f'fill="{_LABEL_INK[key]}">'
        f"{'≈' if inexact else ''}{group.kind}</text>",
    ]
    for spans, begin, widths, top in (
        (aligned.t, group.t0, upper, y),
        (aligned.s, group.s0, lower, band_end),
    ):
        at = x
        stretch = width / sum(widths) if widths else 1.0
        for offset, natural in enumerate(widths):
            label = token_label(spans.view, int(spans.ids[begin + offset]))
            wide = natural * stretch
            parts.append(
                f"<g><title>{escape(_hover(spans, begin + offset))}</title>"
                f'<rect x="{at:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{_TOKEN_HEIGHT}" fill="{colour}" '
                f'fill-opacity="0.10" stroke="{colour}"{dash}/>'
                f'<text x="{at + wide / 2:.1f}" y="{top + 17:.1f}" text-anchor="middle" xml:space="preserve" '
                f'textLength="{_CELL * cell_len(label):.1f}" lengthAdjust="spacingAndGlyphs" fill="#1b1f24">'
                f"{escape(label)}</text></g>"
            )
            at += wide
    return "".join(parts)


def _svg_legend() -> str:
    parts, x = [], 6.0
    for kind, colour in KIND_COLOURS.items():
        parts.append(
            f'<rect x="{x:.0f}" y="10" width="11" height="11" fill="{colour}"/>'
            f'<text x="{x + 16:.0f}" y="20" font-size="12" fill="#57606a">{kind}</text>'
        )
        x += 34 + 8 * len(kind)
    return "".join(parts)


def write_page(path: Path, content: str) -> None:
    """Write a page atomically."""
    from cdm_toolkit.artifacts.atomic import atomic_write

    with atomic_write(path) as stream:
        stream.write(content.encode())
