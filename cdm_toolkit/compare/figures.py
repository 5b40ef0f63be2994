"""The pictures of a study, drawn with matplotlib: the trade-off, lines over alpha, cross-entropy in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cdm_toolkit.artifacts.atomic import atomic_write
from cdm_toolkit.compare.palette import Style, styles
from cdm_toolkit.compare.summary import PLANE, Line, MethodSummary, Summary, summarize
from cdm_toolkit.compare.table import Gap, Gaps, Mean, Text
from cdm_toolkit.compare.types import CellResult, Ring, StudyResult
from cdm_toolkit.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LINES_AMONG_MARKS = 2
"""More lines over α than these have a picture of their own: they would hide the marks."""

PAPER, INK, FAINT, LINE = "#ffffff", "#1b1f24", "#66707b", "#d0d7de"
DARK = {PAPER: "#0d1117", INK: "#e6edf3", FAINT: "#8b949e", LINE: "#30363d"}
"""What these colours are on dark paper; those of the methods are seen on both."""

_LOOK: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 13,
    "axes.xmargin": 0.08,
    "axes.ymargin": 0.08,
    "errorbar.capsize": 2.5,
    "grid.alpha": 0.7,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "legend.labelspacing": 0.55,
    "savefig.dpi": 150,
    "svg.hashsalt": "cdm",
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}
_DASHES = (0, (5, 3))
"""Of the Pareto front."""


def draw(result: StudyResult, folder: str | Path) -> list[Path]:
    """Write a study's pictures as PNG files into a folder and return them; none without a cell.

    FileProblem where they cannot be written, MissingExtra without matplotlib.
    """
    written = []
    for name, figure in pictures(result, summarize(result)).items():
        written.append(Path(folder) / f"{name}.png")
        with atomic_write(written[-1]) as stream:
            figure.savefig(stream, format="png", dpi=_LOOK["savefig.dpi"])
    return written


def pictures(result: StudyResult, summary: Summary) -> dict[str, Figure]:
    """Draw those pictures that a study has the figures for, by name: `trade-off`, `alphas`, `curves`.

    Lines over α are in the trade-off as long as they are few.
    """
    require_matplotlib()
    from matplotlib import rc_context

    found = styles(result.methods)
    apart = len(summary.lines) > LINES_AMONG_MARKS
    drawn = {}
    with rc_context(_LOOK):
        if summary.methods and all(ring in summary.gaps for ring in PLANE):
            drawn["trade-off"] = _plane(summary.methods, () if apart else summary.lines, summary.gaps, found)
            if apart:
                drawn["alphas"] = _plane((), summary.lines, summary.gaps, found)
        if any(cell.curve for method in summary.methods for cell in method.cells):
            drawn["curves"] = _curves(summary.methods, found)
    return drawn


def svg(figure: Figure) -> bytes:
    """Return a picture as SVG, the same bytes for the same picture."""
    from matplotlib import rc_context

    stream = BytesIO()
    with rc_context({"svg.hashsalt": _LOOK["svg.hashsalt"]}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def darkened(picture: bytes) -> bytes:
    """Turn a picture on light paper, as SVG, into one on dark paper."""
    for light, dark in DARK.items():
        picture = picture.replace(light.encode(), dark.encode())
    return picture


def marker_path(style: Style) -> str:
    """Return the outline of a method's marker as an SVG path in a box of 16 by 16."""
    require_matplotlib()
    from matplotlib.markers import MarkerStyle
    from numpy import asarray

    marker = MarkerStyle(style.marker)
    outline = marker.get_path().transformed(marker.get_transform())
    points = [(float(x), float(y)) for polygon in outline.to_polygons() for x, y in asarray(polygon)]
    size = max(abs(value) for point in points for value in point)
    return "M" + "L".join(f"{8 + 7 * x / size:.2f} {8 - 7 * y / size:.2f}" for x, y in points) + "Z"


def require_matplotlib() -> None:
    """Raise MissingExtra where nothing can be drawn: before hours of training."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "compare", "drawing the figures of a study")


def _figure(width: float, height: float, *, title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Make a figure that belongs to no window and no global state; its sizes are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y, facecolor=PAPER)
    return figure, axes


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside right upper")


def _drawn_as(style: Style) -> dict[str, Any]:
    """Return how the marks of a method look, wherever they are."""
    return {
        "color": style.fill,
        "marker": style.marker,
        "markerfacecolor": style.fill,
        "markeredgecolor": style.edge,
    }


def _mark(label: str, **look: Any) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


# The trade-off

_XY = tuple[float, float]


def _plane(
    methods: Sequence[MethodSummary], lines: Sequence[Line], gaps: Gaps, found: Mapping[str, Style]
) -> Figure:
    """Draw methods as marks and lines over α, or one of both alone, by what they gain inside and outside."""
    title = "Up and to the right is better" + ("" if methods else ": over α, one seed")
    x, y = (_axis(ring, gaps[ring]) for ring in PLANE)
    figure, axes = _figure(10, 6.6, title=title, x=x, y=y)
    for line in lines:
        _draw_line(axes, line, gaps, found[line.method])
    for method in reversed(methods):  # the best on top
        _draw_mark(axes, method, gaps, found[method.name])
    axes.autoscale_view()
    axes.autoscale(False)  # what follows leaves the view as it is
    _draw_ends(axes, gaps)
    _draw_front(axes, [_center(method, gaps) for method in methods if method.on_front])
    _legend(figure, [*_names(methods, lines, found), *_reading(methods, lines)])
    return figure


def _axis(ring: Ring, gap: Gap) -> str:
    if gap.is_open:
        return f"share of the gap closed {ring} the domain"
    return f"bits per byte gained {ring} the domain (no gap)"


def _xy(cell: CellResult, gaps: Gaps) -> _XY:
    """Return what a run gains inside and outside: the share of the gap, or bits per byte where there is none."""

    def gained(gap: Gap, bits: float) -> float:
        share = gap.share(bits)
        return gap.start - bits if share is None else share

    x, y = (gained(gaps[ring], Text(ring).of(cell.scores).bits_per_byte) for ring in PLANE)
    return x, y


def _center(method: MethodSummary, gaps: Gaps) -> _XY:
    xs, ys = zip(*(_xy(cell, gaps) for cell in method.cells), strict=True)
    return fmean(xs), fmean(ys)


def _draw_mark(axes: Axes, method: MethodSummary, gaps: Gaps, style: Style) -> None:
    """Draw the mean over seeds with its std, and each seed as a dot."""
    xs, ys = zip(*(_xy(cell, gaps) for cell in method.cells), strict=True)
    if len(xs) > 1:
        axes.plot(xs, ys, ".", color=style.edge, markersize=8, alpha=0.6, markeredgewidth=0, zorder=2.5)
    x, y = Mean.of(xs), Mean.of(ys)
    look = _drawn_as(style) | {"color": style.edge, "markersize": 11, "markeredgewidth": 1.2}
    axes.errorbar(x.value, y.value, xerr=x.std, yerr=y.std, elinewidth=1.3, zorder=3, **look)


def _draw_line(axes: Axes, line: Line, gaps: Gaps, style: Style) -> None:
    """Draw a method over α, each mark as large as its α."""
    points = [_xy(cell, gaps) for cell in line.cells]
    axes.plot(
        *zip(*points, strict=True),
        color=style.fill,
        linewidth=1.6,
        linestyle=_dash(style),
        alpha=0.85,
        zorder=2,
    )
    for (x, y), cell in zip(points, line.cells, strict=True):
        axes.plot(x, y, markersize=_size(cell.cell.alpha), zorder=2, **_drawn_as(style))


def _size(alpha: float) -> float:
    return 3 + 9 * alpha


def _dash(style: Style) -> str:
    return "--" if style.is_variant else "-"


def _draw_ends(axes: Axes, gaps: Gaps) -> None:
    """Draw where the start and the teacher are, as far as they are in view."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    ends = [("start", 0.0)] + [("teacher", 1.0)] * all(gaps[ring].is_open for ring in PLANE)
    for name, at in ends:
        across, up = left <= at <= right, low <= at <= high
        if across:
            axes.axvline(at, color=FAINT, linewidth=1, linestyle=":", zorder=1)
        if up:
            axes.axhline(at, color=FAINT, linewidth=1, linestyle=":", zorder=1)
        if across and up:
            axes.plot(at, at, marker="+", markersize=12, markeredgewidth=2, color=INK)
        if across or up:
            xy = (at if across else left, at if up else low)
            axes.annotate(name, xy, (6, 5), textcoords="offset points", color=FAINT, fontsize=9.5)


def _draw_front(axes: Axes, front: Sequence[_XY]) -> None:
    """Draw the border of what some method reaches: beyond it lies only what none does."""
    if front:
        xs, ys = zip(*sorted(front), strict=True)
        xs, ys = (axes.get_xlim()[0], *xs, xs[-1]), (ys[0], *ys, axes.get_ylim()[0])
        axes.step(xs, ys, where="pre", color=FAINT, linewidth=1.3, linestyle=_DASHES, zorder=1.5)


def _names(
    methods: Sequence[MethodSummary], lines: Sequence[Line], found: Mapping[str, Style]
) -> Iterator[Line2D]:
    for method in methods:
        label = f"{method.name}  (Pareto front)" if method.on_front else method.name
        yield _mark(label, linestyle="", markersize=9, **_drawn_as(found[method.name]))
    for line in lines if not methods else ():
        style = found[line.method]
        yield _mark(line.method, linestyle=_dash(style), linewidth=2, markersize=9, **_drawn_as(style))


def _reading(methods: Sequence[MethodSummary], lines: Sequence[Line]) -> Iterator[Line2D]:
    """Explain the marks that all methods have in common."""
    yield _mark("", linestyle="")
    if methods:
        yield _mark("Pareto front", color=FAINT, linestyle=_DASHES, linewidth=1.3)
    if any(len(method.cells) > 1 for method in methods):
        yield _mark("one seed", color=FAINT, marker=".", linestyle="")
        yield _mark("± std", color=FAINT, marker="|", markersize=9)
    alphas = sorted({cell.cell.alpha for line in lines for cell in line.cells})
    for alpha in dict.fromkeys((alphas[0], alphas[-1])) if alphas else ():
        yield _mark(f"α {alpha:g}", color=FAINT, marker="o", markersize=_size(alpha), linestyle="-")


# Training


def _curves(methods: Sequence[MethodSummary], found: Mapping[str, Style]) -> Figure:
    """Draw cross-entropy over the steps that all seeds of a method have logged, as their mean."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(10, 4.4, title="Cross-entropy in training", x="step", y="nats a label")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = []
    for method in methods:
        logs = [{point.step: point.ce for point in cell.curve} for cell in method.cells]
        steps = sorted(set[int].intersection(*map(set[int], logs)))
        means = [fmean(log[step] for log in logs) for step in steps]
        look = _drawn_as(found[method.name]) | {"linestyle": _dash(found[method.name]), "linewidth": 2}
        axes.plot(steps, means, markersize=5.5, markevery=max(1, len(steps) // 8), **look)
        handles.append(_mark(method.name, markersize=9, **look))
    _legend(figure, handles)
    return figure
