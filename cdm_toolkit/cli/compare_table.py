"""Results of a study on the terminal: a table that fits its width, followed by the verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cdm_toolkit.compare.palette import Style
    from cdm_toolkit.compare.summary import MethodSummary, Summary
    from cdm_toolkit.compare.table import Column
    from cdm_toolkit.compare.types import StudyResult
    from cdm_toolkit.compare.verdicts import Verdict

_SHARE, _BITS, _DIGIT = "share of the gap", "bits per byte", "bits a digit"
_MEASURES = {
    _SHARE: "share\n",
    _BITS: "bits\n",
    "KL, nats": "KL\n",
    "next word": "word\n",
    _DIGIT: "digit\n",
    "cost": "",
}
_NAMES = {"inside": "in", "outside": "out", "s a step": "s a\nstep"}
_SIGN_STYLES = {"▲": "green", "▼": "red", "≈": "dim"}
_LEGEND = (
    "Means over seeds ± standard deviation, best in bold; in, near, out: text of the kinds trained on, near these, far "
    "from these. Share: of the gap between start and teacher that is closed. Bits: per byte. KL: from the teacher, "
    "nats. Word: share of words predicted. Digit: bits of one. ◆: on the Pareto front, no other method is as good "
    "inside and outside and better on one."
)


Spreads = Literal["shares", "score", "none"]
"""Which columns have their std."""
_OTHERS = set(_MEASURES) - {_SHARE}
_DETAILS: tuple[tuple[set[str], Spreads], ...] = (
    (set(), "shares"),
    (set(), "score"),
    ({_DIGIT}, "score"),
    ({_BITS, _DIGIT}, "score"),
    ({_BITS, _DIGIT}, "none"),
    (_OTHERS, "score"),
    (_OTHERS, "none"),
)
"""What to leave out, from most to least detail."""


def table(result: StudyResult) -> RenderableType:
    """Render a study: its methods, best first, the verdicts about the default method, and notes."""
    from cdm_toolkit.compare.palette import styles
    from cdm_toolkit.compare.summary import summarize

    summary = summarize(result)
    parts: list[RenderableType] = [Text(f"{result.name}: {result.pair}", style="bold")]
    if summary.methods:
        parts += [_Fitting(summary, styles(result.methods)), Text(_LEGEND, style="dim"), Text()]
    parts.append(Text(summary.headline, style="bold"))
    parts += [_verdict(verdict) for verdict in summary.verdicts]
    parts += [Text(f"note: {note}", style="yellow") for note in summary.notes]
    return Group(*parts)


def _verdict(verdict: Verdict) -> Table:
    """Lay out a verdict so that its second line, if any, is aligned with the first."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text(verdict.sign, style=_SIGN_STYLES[verdict.sign]), Text(verdict.text))
    return grid


@dataclass(frozen=True, slots=True)
class _Fitting:
    """The table with as much detail as fits the width."""

    summary: Summary
    styles: dict[str, Style]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(width=1000)
        for without, spreads in _DETAILS:
            drawn = self._table(without, spreads)
            if Measurement.get(console, unbounded, drawn).maximum <= options.max_width:
                break
        yield drawn

    @property
    def _score(self) -> Column:
        """The column that methods are judged by: the last share that is defined."""
        shares = [column for column in self.summary.columns("text") if column.measure == _SHARE]
        return ([column for column in shares if column.means] or shares)[-1]

    def _table(self, without: set[str], spreads: Spreads) -> Table:
        columns = [
            column
            for column in self.summary.columns("text", "cost")
            if column.measure not in without and column.name != "matched mass"
        ]
        with_std = {
            "shares": [c for c in columns if c.measure == _SHARE],
            "score": [self._score],
            "none": [],
        }[spreads]
        drawn = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
        drawn.add_column("method", overflow="fold")
        drawn.add_column("runs", justify="right")
        for column in columns:
            head = _MEASURES[column.measure] + _NAMES.get(column.name, column.name)
            drawn.add_column(head, justify="right", no_wrap=True)
        for method in self.summary.methods:
            figures = [_figure(column, method.name, spread=column in with_std) for column in columns]
            last = method is self.summary.methods[-1]
            drawn.add_row(self._name(method), f"{len(method.cells)}", *figures, end_section=last)
        drawn.add_row("start", "", *(column.end(column.start) for column in columns), style="dim")
        drawn.add_row("teacher", "", *(column.end(column.teacher) for column in columns), style="dim")
        return drawn

    def _name(self, method: MethodSummary) -> Text:
        style = self.styles[method.name]
        mark = Text("○ " if style.is_variant else "● ", style=style.edge)
        return mark + Text(method.name) + Text(" ◆" if method.on_front else "", style="dim")


def _figure(column: Column, method: str, *, spread: bool) -> Text:
    written = column.written(method, spread=spread).replace(" ± ", "±")
    return Text(written, style="bold" if method in column.best else "")
