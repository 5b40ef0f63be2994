"""Results of a study on the terminal: a table that fits its width, followed by the verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cdm_toolkit.compare.columns import Column
    from cdm_toolkit.compare.palette import Style
    from cdm_toolkit.compare.summary import MethodSummary, Summary
    from cdm_toolkit.compare.types import StudyResult
    from cdm_toolkit.compare.verdicts import Verdict

_GROUPS = {
    "share of the gap": "share\n",
    "bits per byte": "bits\n",
    "KL, nats": "KL\n",
    "next word": "word\n",
    "bits a digit": "digit\n",
    "cost": "",
}
_NAMES = {"inside": "in", "outside": "out", "s a step": "s a\nstep"}
_SIGNS = {"ahead": ("▲", "green"), "behind": ("▼", "red"), "level": ("≈", "dim")}


def table(result: StudyResult) -> RenderableType:
    """Render a study: its methods, best first, the verdicts about the default method, and notes."""
    from cdm_toolkit.compare.columns import overview
    from cdm_toolkit.compare.palette import styles
    from cdm_toolkit.compare.summary import summarize

    summary = summarize(result)
    found = styles(result.methods)
    parts: list[RenderableType] = [Text(f"{result.name}: {result.pair}", style="bold")]
    if summary.methods:
        columns = overview(result, summary)
        parts += [_Fitting(summary, columns, found), Text(_LEGEND, style="dim"), Text()]
    parts.append(Text(summary.headline, style="bold"))
    parts += [_verdict(verdict) for verdict in summary.verdicts]
    parts += [Text(f"note: {note}", style="yellow") for note in summary.notes]
    return Group(*parts)


_LEGEND = (
    "Means over seeds ± standard deviation, best in bold; in, near, out: text of the kinds trained on, near these, far "
    "from these. Share: of the gap between start and teacher that is closed. Bits: per byte. KL: from the teacher, "
    "nats. Word: share of words predicted. Digit: bits of one. ◆: on the Pareto front, no other method is as good "
    "inside and outside and better on one."
)


def _verdict(verdict: Verdict) -> Table:
    """Lay out a verdict so that its second line, if any, is aligned with the first."""
    sign, style = _SIGNS["ahead" if verdict.ahead else "behind" if verdict.behind else "level"]
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text(sign, style=style), Text(verdict.text))
    return grid


@dataclass(frozen=True, slots=True)
class _Detail:
    """Level of detail of the table."""

    without: frozenset[str]
    """Groups of columns to leave out."""
    spreads: Literal["all", "score", "none"]
    """Which columns have their std."""


_DIGITS = frozenset({"bits a digit"})
_BITS = _DIGITS | {"bits per byte"}
_ALL_BUT_SHARES = frozenset(_GROUPS) - {"share of the gap"}
_DETAILS = (
    _Detail(frozenset(), "all"),
    _Detail(frozenset(), "score"),
    _Detail(_DIGITS, "score"),
    _Detail(_BITS, "score"),
    _Detail(_BITS, "none"),
    _Detail(_ALL_BUT_SHARES, "score"),
    _Detail(_ALL_BUT_SHARES, "none"),
)
"""From most to least detail."""


@dataclass(frozen=True, slots=True)
class _Fitting:
    """The table with as much detail as fits the width."""

    summary: Summary
    columns: tuple[Column, ...]
    styles: dict[str, Style]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(width=1000)
        for detail in _DETAILS:
            drawn = self._table(detail)
            if Measurement.get(console, unbounded, drawn).maximum <= options.max_width:
                break
        yield drawn

    def _table(self, detail: _Detail) -> Table:
        columns = [column for column in self.columns if column.group not in detail.without]
        spread = {"all": columns, "score": [self._score], "none": []}[detail.spreads]
        drawn = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
        drawn.add_column("method", overflow="fold")
        drawn.add_column("runs", justify="right")
        for column in columns:
            drawn.add_column(_head(column), justify="right", no_wrap=True)
        best = [column.best(self.summary.methods) for column in columns]
        methods = self.summary.methods
        for method in methods:
            cells = [
                Text(
                    column.written(method, spread=column in spread).replace(" ± ", "±"),
                    style="bold" if method.name in top else "",
                )
                for column, top in zip(columns, best, strict=True)
            ]
            last = method is methods[-1]
            drawn.add_row(self._name(method), f"{len(method.runs)}", *cells, end_section=last)
        for name, figures in _ends(columns):
            drawn.add_row(name, "", *figures, style="dim")
        return drawn

    @property
    def _score(self) -> Column:
        """The column that methods are judged by: the last share that is defined."""
        shares = [column for column in self.columns if column.group == "share of the gap"]
        defined = [each for each in shares if any(each.read(method) for method in self.summary.methods)]
        return (defined or shares)[-1]

    def _name(self, method: MethodSummary) -> Text:
        style = self.styles[method.name]
        mark = Text("○ " if style.is_variant else "● ", style=style.edge)
        return mark + Text(method.name) + Text(" ◆" if method.on_front else "", style="dim")


def _head(column: Column) -> str:
    return _GROUPS[column.group] + _NAMES.get(column.name, column.name)


def _ends(columns: list[Column]) -> Iterator[tuple[str, list[str]]]:
    yield "start", [column.end(column.start) for column in columns]
    yield "teacher", [column.end(column.teacher) for column in columns]
