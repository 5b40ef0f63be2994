"""The pictures of a study, drawn with matplotlib: the trade-off, the curves of training, bars of what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from cdm_toolkit.artifacts.atomic import atomic_write
from cdm_toolkit.compare.columns import mebibytes
from cdm_toolkit.compare.label_placement import XY, Room
from cdm_toolkit.compare.palette import Style, styles
from cdm_toolkit.compare.summary import PLANE, Gap, Line, Mean, MethodSummary, Run, Score, Summary, summarize
from cdm_toolkit.compare.types import CellResult, Point, Ring, StudyResult
from cdm_toolkit.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of all but the methods."""

    paper: str
    ink: str
    faint: str
    line: str


LINES_AMONG_MARKS = 2
"""More lines over α than these have a picture of their own: they would hide the marks."""
LIGHT = Theme(paper="#ffffff", ink="#1b1f24", faint="#66707b", line="#d0d7de")
DARK = Theme(paper="#0d1117", ink="#e6edf3", faint="#8b949e", line="#30363d")

DPI = 150
_TITLE, _TEXT, _SMALL = 13, 11, 9.5
_INSET = 0.08
"""Room around the points of the trade-off, as a share of their spread."""


def draw(result: StudyResult, folder: str | Path) -> list[Path]:
    """Write a study's pictures as PNG files into a folder and return them; none without a cell.

    FileProblem where they cannot be written, MissingExtra without matplotlib.
    """
    written = []
    for name, figure in pictures(result, summarize(result), LIGHT).items():
        written.append(Path(folder) / f"{name}.png")
        with atomic_write(written[-1]) as stream:
            figure.savefig(stream, format="png", dpi=DPI)
    return written


def pictures(result: StudyResult, summary: Summary, theme: Theme) -> dict[str, Figure]:
    """Draw those pictures that a study has the figures for, by name: `trade-off`, `alphas`, `bars`, `curves`.

    Lines over α are in the trade-off as long as they are few.
    """
    _matplotlib()
    if not summary.methods:
        return {}
    found = styles(result.methods)
    drawn = {}
    if all(ring in summary.gaps for ring in PLANE):
        apart = len(summary.lines) > LINES_AMONG_MARKS
        drawn["trade-off"] = _trade_off(
            summary.methods, () if apart else summary.lines, summary.gaps, found, theme
        )
        if apart:
            drawn["alphas"] = _trade_off((), summary.lines, summary.gaps, found, theme)
    drawn["bars"] = _bars(summary, found, theme)
    if any(cell.curve for cell in result.cells):
        drawn["curves"] = _curves(result, summary, found, theme)
    return drawn


def svg(figure: Figure) -> bytes:
    """Return a picture as SVG, the same bytes for the same picture."""
    from matplotlib import rc_context

    stream = BytesIO()
    with rc_context({"svg.hashsalt": "cdm"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def marker_path(style: Style) -> str:
    """Return the outline of a method's marker as an SVG path in a box of 16 by 16."""
    _matplotlib()
    from matplotlib.markers import MarkerStyle
    from numpy import asarray

    marker = MarkerStyle(style.marker)
    outline = marker.get_path().transformed(marker.get_transform())
    points = [(float(x), float(y)) for polygon in outline.to_polygons() for x, y in asarray(polygon)]
    size = max(abs(value) for point in points for value in point)
    return "M" + "L".join(f"{8 + 7 * x / size:.2f} {8 - 7 * y / size:.2f}" for x, y in points) + "Z"


def _matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("matplotlib", "compare", "drawing the figures of a study") from None


def _figure(width: float, height: float, theme: Theme) -> Figure:
    """Make a figure that belongs to no window and no global state; its sizes are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Axes, theme: Theme, *, title: str = "", x: str = "", y: str = "") -> None:
    axes.set_facecolor(theme.paper)
    axes.set_title(title, fontsize=_TITLE, color=theme.ink, loc="left", pad=10)
    axes.set_xlabel(x, fontsize=_TEXT, color=theme.ink)
    axes.set_ylabel(y, fontsize=_TEXT, color=theme.ink)
    axes.tick_params(colors=theme.faint, labelcolor=theme.ink, labelsize=_SMALL + 0.5)
    axes.grid(color=theme.line, linewidth=0.7, alpha=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.line)


def _legend(figure: Figure, handles: Sequence[Line2D], theme: Theme) -> None:
    figure.legend(
        handles=handles,
        loc="outside right upper",
        frameon=False,
        fontsize=_TEXT,
        labelcolor=theme.ink,
        handlelength=1.8,
        labelspacing=0.55,
    )


def _mark(style: Style, label: str, *, line: bool = False) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=style.fill,
        linestyle=_dash(style) if line else "",
        linewidth=2,
        marker=style.marker,
        markersize=9,
        markerfacecolor=style.fill,
        markeredgecolor=style.edge,
        label=label,
    )


def _dash(style: Style) -> Literal["-", "--"]:
    return "--" if style.is_variant else "-"


# The trade-off


@dataclass(frozen=True, slots=True)
class _Scale:
    """One axis of the trade-off: the share of the gap, or bits per byte where there is no gap."""

    ring: Ring
    gap: Gap

    @property
    def label(self) -> str:
        if self.gap.is_open:
            return f"share of the gap closed {self.ring} the domain"
        return f"bits per byte gained {self.ring} the domain (no gap)"

    def of(self, run: Run) -> float:
        bits = run.bits_per_byte[self.ring]
        share = self.gap.share(bits)
        return self.gap.start - bits if share is None else share


def _xy_of(run: Run, scales: Sequence[_Scale]) -> XY:
    x, y = (scale.of(run) for scale in scales)
    return x, y


def _std_bars(methods: Sequence[MethodSummary], scales: Sequence[_Scale]) -> Iterator[tuple[XY, XY]]:
    """Give the two ends of each bar."""
    for method in methods:
        x, y = (Mean.of([scale.of(run) for run in method.runs]) for scale in scales)
        if x.std is not None and y.std is not None:
            yield (x.value - x.std, y.value), (x.value + x.std, y.value)
            yield (x.value, y.value - y.std), (x.value, y.value + y.std)


def _trade_off(
    methods: Sequence[MethodSummary],
    lines: Sequence[Line],
    gaps: Mapping[Ring, Gap],
    found: Mapping[str, Style],
    theme: Theme,
) -> Figure:
    """Draw methods as marks and lines over α, or one of both alone."""
    scales = [_Scale(ring, gaps[ring]) for ring in PLANE]
    figure = _figure(10, 6.6, theme)
    axes = figure.add_subplot()
    title = "Up and to the right is better" + ("" if methods else ": over α, one seed")
    _dress(axes, theme, title=title, x=scales[0].label, y=scales[1].label)
    points = [_xy_of(run, scales) for run in _all_runs(methods, lines)]
    _view(axes, [*chain(*_std_bars(methods, scales)), *points])
    _ends(axes, scales, theme)
    if methods:
        _front_line(axes, methods, scales, theme)
    for line in lines:
        _alpha_line(axes, line, scales, found[line.method])
    for method in reversed(methods):  # the best on top
        _draw_mark(axes, method, scales, found[method.name])
    handles = [_mark(found[method.name], _named(method)) for method in methods]
    handles += [] if methods else [_mark(found[line.method], line.method, line=True) for line in lines]
    _legend(figure, [*handles, *_reading(methods, lines, theme)], theme)
    figure.draw_without_rendering()
    _labels(figure, axes, methods, lines, scales, found, theme)
    return figure


def _named(method: MethodSummary) -> str:
    return f"{method.name}  (Pareto front)" if method.on_front else method.name


def _all_runs(methods: Sequence[MethodSummary], lines: Sequence[Line]) -> Iterator[Run]:
    for method in methods:
        yield from method.runs
    for line in lines:
        yield from line.points


def _view(axes: Axes, points: Sequence[XY]) -> None:
    """Set what is in view: all points, with room around them."""
    xs, ys = zip(*points, strict=True)
    axes.set_xlim(_with_room(xs))
    axes.set_ylim(_with_room(ys))


def _with_room(values: Sequence[float]) -> XY:
    low, high = min(values), max(values)
    room = _INSET * (high - low) or 0.05
    return low - room, high + room


def _ends(axes: Axes, scales: Sequence[_Scale], theme: Theme) -> None:
    """Draw where the start and the teacher are, as far as they are in view."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    ends = [("start", 0.0)] + [("teacher", 1.0)] * all(scale.gap.is_open for scale in scales)
    for name, at in ends:
        across, up = left <= at <= right, low <= at <= high
        if across:
            axes.axvline(at, color=theme.faint, linewidth=1, linestyle=":")
        if up:
            axes.axhline(at, color=theme.faint, linewidth=1, linestyle=":")
        if across and up:
            axes.plot(at, at, marker="+", markersize=12, markeredgewidth=2, color=theme.ink)
        if across or up:
            xy = (at if across else left, at if up else low)
            axes.annotate(name, xy, (6, 5), textcoords="offset points", color=theme.faint, fontsize=_SMALL)


def _front_line(axes: Axes, methods: Sequence[MethodSummary], scales: Sequence[_Scale], theme: Theme) -> None:
    """Draw the border of what some method reaches: beyond it lies only what none does."""
    front = sorted(_center(method, scales) for method in methods if method.on_front)
    low, left = axes.get_ylim()[0], axes.get_xlim()[0]
    xs = [left, *(x for x, _ in front), front[-1][0]]
    ys = [front[0][1], *(y for _, y in front), low]
    axes.step(xs, ys, where="pre", color=theme.faint, linewidth=1.3, linestyle=(0, (5, 3)), zorder=1.5)


def _center(method: MethodSummary, scales: Sequence[_Scale]) -> XY:
    x, y = (fmean(scale.of(run) for run in method.runs) for scale in scales)
    return x, y


def _alpha_line(axes: Axes, line: Line, scales: Sequence[_Scale], style: Style) -> None:
    axes.plot(
        *([scale.of(run) for run in line.points] for scale in scales),
        color=style.fill,
        linewidth=1.6,
        linestyle=_dash(style),
        marker=style.marker,
        markersize=5,
        markeredgecolor=style.edge,
        alpha=0.85,
        zorder=2,
    )


def _draw_mark(axes: Axes, method: MethodSummary, scales: Sequence[_Scale], style: Style) -> None:
    xs, ys = ([scale.of(run) for run in method.runs] for scale in scales)
    if len(xs) > 1:
        axes.plot(xs, ys, ".", color=style.edge, markersize=8, alpha=0.6, markeredgewidth=0, zorder=2.5)
    axes.errorbar(
        fmean(xs),
        fmean(ys),
        xerr=Mean.of(xs).std,
        yerr=Mean.of(ys).std,
        color=style.edge,
        elinewidth=1.3,
        capsize=2.5,
        marker=style.marker,
        markersize=11,
        markerfacecolor=style.fill,
        markeredgecolor=style.edge,
        markeredgewidth=1.2,
        zorder=3,
    )


def _reading(methods: Sequence[MethodSummary], lines: Sequence[Line], theme: Theme) -> list[Line2D]:
    """Explain the marks that all methods have in common."""
    from matplotlib.lines import Line2D

    if not methods:
        return []
    faint = theme.faint
    several = any(len(method.runs) > 1 for method in methods)
    return [
        Line2D([], [], linestyle="", label=""),
        Line2D([], [], color=faint, linestyle=(0, (5, 3)), linewidth=1.3, label="Pareto front"),
        *([Line2D([], [], color=faint, marker=".", linestyle="", label="one seed")] if several else []),
        *([Line2D([], [], color=faint, marker="|", markersize=9, label="± std")] if several else []),
        *([Line2D([], [], color=faint, marker="o", markersize=5, label="over alpha")] if lines else []),
    ]


def _labels(
    figure: Figure,
    axes: Axes,
    methods: Sequence[MethodSummary],
    lines: Sequence[Line],
    scales: Sequence[_Scale],
    found: Mapping[str, Style],
    theme: Theme,
) -> None:
    """Write each method's name beside its mark and each alpha beside its point of a line."""
    point = figure.dpi / 72
    room = Room((axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.bbox.y1))
    courses = [[_xy_of(run, scales) for run in line.points] for line in lines]
    for begin, end in chain(_std_bars(methods, scales), *map(pairwise, courses)):
        room.take_line(_pixels(axes, begin), _pixels(axes, end), 2 * point)
    for run in _all_runs(methods, lines):
        room.take(_pixels(axes, _xy_of(run, scales)), 3 * point)
    centers = {method.name: _center(method, scales) for method in methods}
    for center in centers.values():
        room.take(_pixels(axes, center), 9 * point)
    for name, center in centers.items():
        _label(axes, center, name, _TEXT, 13 * point, room, theme, theme.ink)
    for line in lines:
        for run in line.points:
            xy, text, colour = _xy_of(run, scales), f"α {run.alpha:g}", found[line.method].edge
            _label(axes, xy, text, _SMALL, 7 * point, room, theme, colour)


def _pixels(axes: Axes, xy: XY) -> XY:
    x, y = axes.transData.transform(xy)
    return float(x), float(y)


def _label(
    axes: Axes, at: XY, text: str, size: float, away: float, room: Room, theme: Theme, colour: str
) -> None:
    """Write a text beside a point, where there is room."""
    from matplotlib.patheffects import withStroke

    label = axes.annotate(
        text, at, at, xycoords="data", fontsize=size, color=colour, ha="center", va="center"
    )
    label.set_path_effects([withStroke(linewidth=3, foreground=theme.paper)])
    extent = label.get_window_extent()
    center = room.label(_pixels(axes, at), extent.width, extent.height, away=away)
    x, y = axes.transData.inverted().transform(center)
    label.set_position((float(x), float(y)))


# Bars


@dataclass(frozen=True, slots=True)
class _Panel:
    """A figure of every method as bars: one of all text, or one of each ring."""

    title: str
    unit: str
    bars: Sequence[Callable[[MethodSummary], Mean | None]]
    center: Callable[[MethodSummary], Mean | None] = lambda _: None
    write: str = "{:.3f}"
    """The figure beside a single bar."""


def _panels(summary: Summary) -> list[_Panel]:
    """Give the panels that a study has figures for."""

    def of_rings(read: Callable[[Score], Mean | None]) -> list[Callable[[MethodSummary], Mean | None]]:
        return [partial(_of_ring, ring=ring, read=read) for ring in summary.gaps]

    order = f"from above: {', '.join(summary.gaps)}" if len(summary.gaps) > 1 else ", ".join(summary.gaps)
    panels = (
        _Panel(
            "Share of the gap closed",
            f"{order}\n◆ {summary.score_name}",
            of_rings(lambda score: score.share),
            lambda method: method.score,
        ),
        _Panel(
            "KL(teacher ‖ student)",
            f"nats a shared boundary\n{order}",
            of_rings(lambda score: score.divergence),
        ),
        _Panel(
            "Next-word accuracy", f"share of words\n{order}", of_rings(lambda score: score.next_word_accuracy)
        ),
        _Panel("Digits", f"bits a digit\n{order}", of_rings(lambda score: score.bits_per_digit)),
        _Panel("Time of a step", "seconds", [lambda method: method.step_seconds]),
        _Panel("Peak memory", "MiB", [lambda method: mebibytes(method.peak_memory)], write="{:,.0f}"),
    )
    return [
        panel for panel in panels if any(read(method) for read in panel.bars for method in summary.methods)
    ]


def _of_ring(method: MethodSummary, ring: Ring, read: Callable[[Score], Mean | None]) -> Mean | None:
    return read(method.rings[ring])


def _bars(summary: Summary, found: Mapping[str, Style], theme: Theme) -> Figure:
    methods = summary.methods[::-1]  # axes count from below
    panels = _panels(summary)
    lines = (len(panels) + 1) // 2
    figure = _figure(11, lines * (1.5 + 0.42 * len(methods)), theme)
    every = figure.subplots(lines, 2, sharey=True, squeeze=False)
    for unused in every.flat[len(panels) :]:
        unused.set_visible(False)
    for axes, panel in zip(every.flat, panels, strict=False):
        _dress(axes, theme, title=panel.title, x=panel.unit)
        for height, method in enumerate(methods):
            _bars_of(axes, panel, method, height, found[method.name], theme)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.14)
        axes.axvline(0, color=theme.faint, linewidth=1)
    every[0, 0].set_yticks(range(len(methods)), [method.name for method in methods], fontsize=_TEXT)
    every[0, 0].set_ylim(-0.6, len(methods) - 0.4)
    return figure


def _bars_of(
    axes: Axes, panel: _Panel, method: MethodSummary, height: int, style: Style, theme: Theme
) -> None:
    thick = 0.72 / len(panel.bars)
    for index, read in enumerate(panel.bars):
        mean = read(method)
        if mean is None:
            continue
        y = height + thick * ((len(panel.bars) - 1) / 2 - index)
        colour = _blend(style.fill, theme.paper, 1 - 0.65 * index / max(1, len(panel.bars) - 1))
        axes.barh(y, mean.value, thick, color=colour, edgecolor=style.edge, linewidth=0.8)
        axes.errorbar(mean.value, y, xerr=mean.std, color=theme.ink, elinewidth=1, capsize=2)
        if len(panel.bars) == 1:
            _value(axes, mean, y, panel.write, theme)
    center = panel.center(method)
    if center is not None:
        axes.errorbar(
            center.value,
            height,
            xerr=center.std,
            color=theme.ink,
            marker="D",
            markersize=6,
            markeredgecolor=theme.paper,
            elinewidth=1.2,
            capsize=2.5,
            zorder=4,
        )


def _value(axes: Axes, mean: Mean, y: float, write: str, theme: Theme) -> None:
    axes.annotate(
        write.format(mean.value),
        (mean.value + (mean.std or 0.0), y),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize=_SMALL,
        color=theme.ink,
    )


def _blend(colour: str, paper: str, share: float) -> str:
    """Mix so much of a colour with that of the paper."""
    pairs = zip(_parts(colour), _parts(paper), strict=True)
    return "#" + "".join(f"{round(share * part + (1 - share) * under):02x}" for part, under in pairs)


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


# Curves


def _curves(result: StudyResult, summary: Summary, found: Mapping[str, Style], theme: Theme) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure = _figure(12, 4.8, theme)
    left, right = figure.subplots(1, 2)
    _dress(left, theme, title="Cross-entropy in training", x="step", y="nats a label")
    _dress(
        right, theme, title="KD in training, each method on its own scale", x="step", y="KD ÷ its first value"
    )
    drawn = []
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for method in summary.methods:
        style = found[method.name]
        cells = [each for each in result.cells if each.cell.method == method.name and not each.cell.in_curve]
        _curve(left, _over_seeds(cells, lambda point: point.ce), style)
        distilled = _over_seeds(cells, lambda point: point.kd)
        if distilled and distilled[0][1] > 0:
            first = distilled[0][1]
            _curve(right, [(step, value / first) for step, value in distilled], style)
        drawn.append(_mark(style, method.name, line=True))
    _legend(figure, drawn, theme)
    return figure


def _over_seeds(
    cells: Sequence[CellResult], read: Callable[[Point], float | None]
) -> list[tuple[int, float]]:
    """Average a figure of the log over runs, at the steps that all of them have."""
    logs = [
        {point.step: value for point in cell.curve if (value := read(point)) is not None} for cell in cells
    ]
    common = sorted(set[int].intersection(*(set(log) for log in logs)))
    return [(step, fmean(log[step] for log in logs)) for step in common]


def _curve(axes: Axes, points: Sequence[tuple[int, float]], style: Style) -> None:
    axes.plot(
        [step for step, _ in points],
        [value for _, value in points],
        color=style.fill,
        linestyle=_dash(style),
        linewidth=2,
        marker=style.marker,
        markersize=5.5,
        markeredgecolor=style.edge,
        markevery=max(1, len(points) // 8),
    )
