"""A study as one page that a browser shows offline: no script, nothing fetched, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from cdm_toolkit.artifacts.atomic import atomic_write
from cdm_toolkit.compare.columns import MISSING, Column, by_kind, continuations, overview, suites
from cdm_toolkit.compare.figures import DARK, LIGHT, LINES_AMONG_MARKS, marker_path, pictures, svg
from cdm_toolkit.compare.palette import Style, styles
from cdm_toolkit.compare.summary import Line, MethodSummary, Summary, summarize
from cdm_toolkit.compare.types import ModelScores, Ring, StudyResult
from cdm_toolkit.compare.verdicts import Verdict

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #59636e; --paper: #ffffff; --line: #d0d7de;
        --band: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9198a1; --paper: #0d1117; --line: #30363d; --band: #161b22; }
}
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1230px; margin: 2.5rem auto 4rem; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.8rem 0 .6rem; }
h3 { font-size: .95rem; margin: 1.6rem 0 .3rem; }
p { max-width: 75ch; }
.about, .faint, figcaption { color: var(--faint); } .about { margin: 0; }
.headline { font-size: 1.2rem; font-weight: 600; margin: 1.4rem 0 .6rem; }
.note { border-left: 3px solid #d98c00; background: var(--band); padding: .5rem .9rem; margin: .6rem 0;
        max-width: 85ch; }
.verdicts { list-style: none; padding: 0; margin: .4rem 0; columns: 2 27rem; column-gap: 2rem; }
.verdicts li { break-inside: avoid; display: grid; grid-template-columns: 1.5rem 1.5rem 1fr; padding: .12rem 0;
               font-variant-numeric: tabular-nums; }
.verdicts .sign { color: var(--faint); } .verdicts .mark { align-self: start; margin-top: .28em; }
.mark { width: .95em; height: .95em; vertical-align: -.1em; margin-right: .55em; }
.scroll { overflow-x: auto; margin: .4rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .34rem .55rem; text-align: left; vertical-align: baseline; white-space: nowrap; }
thead th { font-weight: 600; } thead .group { text-align: center; border-bottom: 1px solid var(--line); }
tbody tr { border-top: 1px solid var(--line); } tbody tr:hover { background: var(--band); }
tbody th { font-weight: inherit; }
thead tr:last-child th { padding-bottom: .45rem; }
td.figure, th.figure { text-align: right; font-variant-numeric: tabular-nums; }
td.first, th.first { padding-left: 1.2rem; }
td.best { font-weight: 700; } td .spread { color: var(--faint); font-weight: 400; font-size: .92em; }
tr.end { color: var(--faint); } tr.end.top { border-top: 2px solid var(--line); }
td.wrap { white-space: normal; min-width: 18rem; }
.said td { white-space: pre-wrap; max-width: 75ch; } .said th { vertical-align: top; }
.facts th { color: var(--faint); font-weight: 400; padding-left: 0; } .facts td { white-space: normal; }
figure { margin: 1.2rem 0 2rem; max-width: 1060px; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; margin-top: .5rem; max-width: 95ch; }
code, pre { font: .86em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
code { background: var(--band); border-radius: 4px; padding: .1em .35em; }
.settings code { display: inline-block; margin: .1rem .25rem .1rem 0; }
pre { background: var(--band); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--faint); }
@media print { body { margin: 0; max-width: none; } .scroll { overflow: visible; } }
"""


def write_page(result: StudyResult, path: str | Path) -> None:
    """Write a study's page, whole or not at all. FileProblem, and MissingExtra without matplotlib."""
    content = study_page(result)
    with atomic_write(path) as stream:
        stream.write(content.encode())


def study_page(result: StudyResult) -> str:
    """Draw a study as one self-contained page."""
    summary = summarize(result)
    found = styles(result.methods)
    marks = {name: _mark(style) for name, style in found.items()}
    drawn = _figures(result, summary)
    body = [
        _head(result, summary, marks),
        _facts(result),
        *([drawn["trade-off"]] if "trade-off" in drawn else []),
        *(_tables(result, summary, marks) if summary.methods else []),
        *(drawn[name] for name in ("bars", "curves") if name in drawn),
        *_kinds(result, summary, marks),
        *_continuations(result, summary, marks),
        *_lines(summary, marks, drawn.get("alphas", "<h2>Over α</h2>")),
        *_settings(summary, marks),
        _provenance(result.provenance),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(result.name)}: {escape(result.pair)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _mark(style: Style) -> str:
    return (
        f'<svg class="mark" viewBox="0 0 16 16" aria-hidden="true"><path d="{marker_path(style)}" '
        f'fill="{style.fill}" stroke="{style.edge}" stroke-width="1.2"/></svg>'
    )


# What came out


def _head(result: StudyResult, summary: Summary, marks: Mapping[str, str]) -> str:
    parts = [
        f"<h1>{escape(result.pair)}</h1>",
        f'<p class="about">{escape(result.name)}. {escape(result.about)}</p>',
        f'<p class="headline">{escape(summary.headline)}</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in summary.notes),
    ]
    if summary.verdicts:
        items = "\n".join(_verdict(verdict, marks) for verdict in summary.verdicts)
        parts.append(f'<ul class="verdicts">\n{items}\n</ul>')
        parts.append(f'<p class="faint">{escape(_how_judged(summary))}</p>')
    return "\n".join(parts)


def _verdict(verdict: Verdict, marks: Mapping[str, str]) -> str:
    sign = "▲" if verdict.ahead else "▼" if verdict.behind else "≈"
    return (
        f'<li><span class="sign">{sign}</span>{marks[verdict.other]}<span>{escape(verdict.text)}</span></li>'
    )


def _how_judged(summary: Summary) -> str:
    return (
        f"Judged by the {summary.score_name}: of the gap between start and teacher, in bits per byte of held-out text, "
        "what a method closes. Differences are between runs of the same seed, with their 95 % interval; one method "
        "beats another where p is below 0.05 in a paired t-test, corrected by Holm for all comparisons of the study."
    )


def _facts(result: StudyResult) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n'
        for name, value in result.facts.items()
    )
    return f'<h2>What was compared</h2>\n<table class="facts"><tbody>\n{rows}</tbody></table>'


# Tables


def _tables(result: StudyResult, summary: Summary, marks: Mapping[str, str]) -> Iterator[str]:
    yield "<h2>Methods</h2>"
    yield _method_table(summary.methods, overview(result, summary), marks, details=True)
    yield (
        '<p class="faint">Means over seeds ± standard deviation; the best figure of a column is bold. ◆: on the Pareto '
        "front, no other method is as good inside and outside and better on one. Share of the gap: 0 at the start, 1 "
        "at the teacher. KL in nats a shared boundary of tokens. Next word: share of words whose every token is the "
        "likeliest. Bits a digit: of all tokens with a digit.</p>"
    )
    measured = suites(result)
    if measured:
        yield "<h2>Suites</h2>"
        yield _method_table(summary.methods, measured, marks)


def _kinds(result: StudyResult, summary: Summary, marks: Mapping[str, str]) -> Iterator[str]:
    if not summary.methods:
        return
    yield "<h2>By kind of text</h2>"
    for title, columns in by_kind(result, summary).items():
        yield f"<h3>{escape(title)}</h3>"
        yield _method_table(summary.methods, columns, marks)


def _continuations(result: StudyResult, summary: Summary, marks: Mapping[str, str]) -> Iterator[str]:
    """Show what was measured on greedy continuations, and the texts themselves: of each method, its first cell's."""
    columns = continuations(result, summary)
    if not columns:
        return
    yield "<h2>Greedy continuations</h2>"
    yield _method_table(summary.methods, columns, marks)
    yield (
        '<p class="faint">Agreement: share of the text until it first differs from what the teacher says itself. '
        "Repetition: share of the sequences of four words that came before.</p>"
    )
    speakers = [("teacher", "", result.teacher), ("start", "", result.start)]
    for method in summary.methods:
        cells = [each for each in result.cells if each.cell.method == method.name and not each.cell.in_curve]
        speakers.append(
            (method.name, marks[method.name], min(cells, key=lambda each: each.cell.index).scores)
        )
    for kind, texts in result.teacher.continuations.items():
        rows = [_said(at, kind, speakers) for at in range(len(texts))]
        prompts = f"{len(rows)} prompt{'s' if len(rows) > 1 else ''}"
        yield f"<details><summary>{escape(kind)}: {prompts}</summary>{''.join(rows)}</details>"


def _said(at: int, kind: str, speakers: Sequence[tuple[str, str, ModelScores]]) -> str:
    """Lay out one prompt and what each model says after it."""
    prompt = speakers[0][2].continuations[kind][at].prompt
    rows = "".join(
        f'<tr><th scope="row">{mark}{escape(name)}</th><td>{escape(scores.continuations[kind][at].text)}</td></tr>\n'
        for name, mark, scores in speakers
        if kind in scores.continuations
    )
    return f'<pre>{escape(prompt)}</pre><table class="said"><tbody>\n{rows}</tbody></table>'


def _method_table(
    methods: Sequence[MethodSummary],
    columns: Sequence[Column],
    marks: Mapping[str, str],
    *,
    details: bool = False,
) -> str:
    """Draw a table with a row for each method, the start and the teacher; `details` adds seeds, alpha and the front."""
    best = [column.best(methods) for column in columns]
    firsts = _firsts(columns)
    extra = ("seeds", "α") if details else ()
    rows = []
    for method in methods:
        cells = [
            _figure(column.written(method), best=method.name in top, first=i in firsts)
            for i, (column, top) in enumerate(zip(columns, best, strict=True))
        ]
        about = [f"{len(method.runs)}", f"{method.runs[0].alpha:g}"] if details else []
        front = " ◆" if details and method.on_front else ""
        name = f'<th scope="row">{marks[method.name]}{escape(method.name)}{front}</th>'
        rows.append(f"<tr>{name}{''.join(map(_figure, about))}{''.join(cells)}</tr>")
    rows += [
        _end_row(name, [column.end(getattr(column, name)) for column in columns], len(extra), firsts)
        for name in ("start", "teacher")
    ]
    return _frame(_table_head(columns, extra, firsts), rows)


def _firsts(columns: Sequence[Column]) -> set[int]:
    """Return the columns that open a group."""
    return {i for i, column in enumerate(columns) if i == 0 or columns[i - 1].group != column.group}


def _table_head(columns: Sequence[Column], extra: Sequence[str], firsts: set[int]) -> str:
    groups = "".join(
        f'<th class="group" colspan="{len(list(members))}" scope="colgroup">{escape(group)}</th>'
        for group, members in groupby(columns, key=lambda column: column.group)
    )
    names = "".join(_heading(name) for name in extra)
    names += "".join(_heading(column.name, first=i in firsts) for i, column in enumerate(columns))
    return (
        f'<tr><td colspan="{1 + len(extra)}"></td>{groups}</tr>\n<tr><th scope="col">method</th>{names}</tr>'
    )


def _heading(text: str, *, first: bool = False) -> str:
    return f'<th class="figure{" first" if first else ""}" scope="col">{escape(text)}</th>'


def _end_row(name: str, figures: Sequence[str], extra: int, firsts: set[int]) -> str:
    cells = "".join(_figure(figure, first=i in firsts) for i, figure in enumerate(figures))
    top = " top" if name == "start" else ""
    return f'<tr class="end{top}"><th scope="row">{name}</th>{"<td></td>" * extra}{cells}</tr>'


def _figure(text: str, *, best: bool = False, first: bool = False) -> str:
    value, sign, spread = text.partition(" ± ")
    shown = escape(value) + (f' <span class="spread">± {escape(spread)}</span>' if sign else "")
    return f'<td class="figure{" best" if best else ""}{" first" if first else ""}">{shown}</td>'


def _frame(head: str, rows: Iterable[str]) -> str:
    body = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _lines(summary: Summary, marks: Mapping[str, str], above: str) -> Iterator[str]:
    if not summary.lines:
        return
    yield above
    yield '<p class="faint">α is the weight of cross-entropy; the rest is distillation. Share of the gap, one seed.</p>'
    rings = [ring for ring, gap in summary.gaps.items() if gap.is_open]
    names = ["method", "seed", "α", *rings, *(["mean"] if len(rings) > 1 else [])]
    head = "".join(f'<th scope="col">{name}</th>' if name == "method" else _heading(name) for name in names)
    yield _frame(f"<tr>{head}</tr>", [row for line in summary.lines for row in _line(line, rings, marks)])


def _line(line: Line, rings: Sequence[Ring], marks: Mapping[str, str]) -> Iterator[str]:
    for run in line.points:
        figures = [f"{run.seed}", f"{run.alpha:g}", *(f"{run.shares[ring]:.3f}" for ring in rings)]
        if len(rings) > 1:
            figures.append(MISSING if run.score is None else f"{run.score:.3f}")
        name = f'<th scope="row">{marks[line.method]}{escape(line.method)}</th>'
        yield f"<tr>{name}{''.join(map(_figure, figures))}</tr>"


# Pictures

_CAPTIONS = {
    "trade-off": (
        "Trade-off",
        "Share of the gap between start (0) and teacher (1) that each method closes: on text of the kinds trained on, "
        "and on other text. Large marks are means, bars ± one standard deviation, dots single seeds. The dashed "
        "line is the Pareto front.",
    ),
    "alphas": (
        "Over α",
        "The same shares, each method followed over the weight of cross-entropy, with its first seed alone.",
    ),
    "bars": (
        "Gain and cost",
        "Shares of the gap, divergence from the teacher and bits a digit on held-out text (lower is better), next-word "
        "accuracy, and what a step takes. "
        "Whiskers: ± one standard deviation over seeds.",
    ),
    "curves": (
        "Training",
        "Means over seeds. Cross-entropy can be compared between methods; KD cannot, each method defines its own, so "
        "each is drawn relative to its first value.",
    ),
}


def _figures(result: StudyResult, summary: Summary) -> dict[str, str]:
    dark = pictures(result, summary, DARK)
    return {
        name: _picture(name, svg(light), svg(dark[name]), summary)
        for name, light in pictures(result, summary, LIGHT).items()
    }


def _picture(name: str, light: bytes, dark: bytes, summary: Summary) -> str:
    title, caption = _CAPTIONS[name]
    if name == "trade-off" and 0 < len(summary.lines) <= LINES_AMONG_MARKS:
        caption += " Lines follow a method over α."
    return (
        f"<h2>{title}</h2>\n<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(_alt(name, summary))}"></picture>\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _data(image: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(image).decode()


def _alt(name: str, summary: Summary) -> str:
    """Say what a picture shows to those who do not see it; its figures are in the tables."""
    names = ", ".join(method.name for method in summary.methods)
    if name == "curves":
        return f"Lines of cross-entropy and of KD over the steps of training, for {names}."
    if name == "bars":
        return (
            f"Bars of shares of the gap, divergence, time of a step and peak memory, for {names}, best first."
        )
    if name == "alphas":
        lines = ", ".join(line.method for line in summary.lines)
        return f"Lines over α in the same plane, for {lines}: their points are in the table below."
    points = "; ".join(_described(method) for method in summary.methods)
    return f"Methods by what they gain inside and outside the domain. {points}."


def _described(method: MethodSummary) -> str:
    shares = [
        f"{ring} no gap" if score.share is None else f"{ring} {score.share.value:.3f}"
        for ring, score in method.rings.items()
    ]
    return f"{method.name}: {', '.join(shares)}{', on the Pareto front' if method.on_front else ''}"


# Settings and provenance

_OF_A_CELL = ("output", "train.seed")
"""Settings that differ between cells of one method."""


def _settings(summary: Summary, marks: Mapping[str, str]) -> Iterator[str]:
    if not summary.methods:
        return
    flat = {method.name: dict(_flat(method.settings)) for method in summary.methods}
    common = _common(list(flat.values()))
    rows = []
    for name, settings in flat.items():
        own = [
            f"<code>{escape(f'{key}: {_written(value)}')}</code>"
            for key, value in settings.items()
            if key not in common and key not in _OF_A_CELL
        ]
        nothing = "as all others" if any(map(_is_of_teacher, settings)) else "no teacher"
        rows.append(
            f'<tr><th scope="row">{marks[name]}{escape(name)}</th>'
            f'<td class="wrap settings">{" ".join(own) or nothing}</td></tr>'
        )
    yield "<h2>Settings</h2>"
    yield (
        '<p class="faint">Where methods differ. The rest is the same for all, that of the teacher for all that have '
        "one.</p>"
    )
    yield _frame('<tr><th scope="col">method</th><th scope="col">its own</th></tr>', rows)
    for method in summary.methods:
        yield f"<details><summary>all of {escape(method.name)}</summary>{_yaml(method.settings)}</details>"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give each setting by its dotted name, as assignments have it."""
    if isinstance(value, Mapping) and value:
        items = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and value and not all(isinstance(each, str | int) for each in value):
        items = [(str(i), each) for i, each in enumerate(value)]
    else:
        yield prefix, value
        return
    for key, each in items:
        yield from _flat(each, f"{prefix}.{key}" if prefix else key)


def _common(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Name the settings that are the same for all methods; those of a teacher, for all methods that have one."""
    taught = [each for each in settings if any(_is_of_teacher(key) for key in each)]
    return {
        key
        for each in settings
        for key, value in each.items()
        if all(key in peer and peer[key] == value for peer in (taught if _is_of_teacher(key) else settings))
    }


def _is_of_teacher(key: str) -> bool:
    return key.startswith("teachers.")


def _written(value: Any) -> str:
    import yaml

    dumped: str = yaml.safe_dump(_plain(value), default_flow_style=True, allow_unicode=True, width=10_000)
    return dumped.removesuffix("...\n").strip()


def _yaml(value: Any) -> str:
    import yaml

    return f"<pre>{escape(yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True))}</pre>"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _provenance(provenance: Mapping[str, Any]) -> str:
    return f"<h2>Provenance</h2>\n{_yaml(provenance)}"
