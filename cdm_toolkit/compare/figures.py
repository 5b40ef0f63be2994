"""The pictures of a study, drawn with matplotlib: the trade-off of methods, and lines over alpha."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """Draw those pictures that a study has the figures for, by name: `trade-off` of methods, `alphas` of lines."""
    require_matplotlib()
    from matplotlib import rc_context

    found, gaps = styles(result.methods), summary.gaps
    if not all(ring in gaps for ring in PLANE):
        return {}
    drawn = {}
    with rc_context(_LOOK):
        if summary.methods:
            drawn["trade-off"] = _trade_off(summary.methods, gaps, found)
        if summary.lines:
            drawn["alphas"] = _alphas(summary.lines, gaps, found)
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


def _plane(title: str, gaps: Gaps) -> tuple[Figure, Axes]:
    """Make a figure of what is gained inside and outside, that belongs to no window and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.6), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    x, y = (_axis(ring, gaps[ring]) for ring in PLANE)
    title = f"Up and to the right is better{title}"
    return figure, figure.add_subplot(title=title, xlabel=x, ylabel=y, facecolor=PAPER)


def _finish(figure: Figure, axes: Axes, gaps: Gaps, handles: Iterable[Line2D]) -> Figure:
    """Draw the start and the teacher where these are in view, which stays as it is, and a legend."""
    axes.autoscale_view()
    axes.autoscale(False)
    _draw_ends(axes, gaps)
    figure.legend(handles=list(handles), loc="outside right upper")
    return figure


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


_XY = tuple[float, float]


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


# Methods


def _trade_off(methods: Sequence[MethodSummary], gaps: Gaps, found: Mapping[str, Style]) -> Figure:
    """Draw methods as marks, with the Pareto front."""
    figure, axes = _plane("", gaps)
    points = {method.name: [_xy(cell, gaps) for cell in method.cells] for method in methods}
    for method in reversed(methods):  # the best on top
        _draw_mark(axes, points[method.name], found[method.name])
    handles = []
    for method in methods:
        label = f"{method.name}  (Pareto front)" if method.on_front else method.name
        handles.append(_mark(label, linestyle="", markersize=9, **_drawn_as(found[method.name])))
    handles.append(_mark("", linestyle=""))
    handles.append(_mark("Pareto front", color=FAINT, linestyle=_DASHES, linewidth=1.3))
    if any(len(method.cells) > 1 for method in methods):
        handles.append(_mark("one seed", color=FAINT, marker=".", linestyle=""))
        handles.append(_mark("± std", color=FAINT, marker="|", markersize=9))
    _finish(figure, axes, gaps, handles)
    fronts = (points[method.name] for method in methods if method.on_front)
    _draw_front(axes, [(fmean(x for x, _ in of), fmean(y for _, y in of)) for of in fronts])
    return figure


def _draw_mark(axes: Axes, points: Sequence[_XY], style: Style) -> None:
    """Draw the mean over seeds with its std, and each seed as a dot."""
    xs, ys = zip(*points, strict=True)
    if len(xs) > 1:
        axes.plot(xs, ys, ".", color=style.edge, markersize=8, alpha=0.6, markeredgewidth=0, zorder=2.5)
    x, y = Mean.of(xs), Mean.of(ys)
    look = _drawn_as(style) | {"color": style.edge, "markersize": 11, "markeredgewidth": 1.2}
    axes.errorbar(x.value, y.value, xerr=x.std, yerr=y.std, elinewidth=1.3, zorder=3, **look)


def _draw_front(axes: Axes, front: Sequence[_XY]) -> None:
    """Draw the border of what some method reaches: beyond it lies only what none does."""
    xs, ys = zip(*sorted(front), strict=True)
    xs, ys = (axes.get_xlim()[0], *xs, xs[-1]), (ys[0], *ys, axes.get_ylim()[0])
    axes.step(xs, ys, where="pre", color=FAINT, linewidth=1.3, linestyle=_DASHES, zorder=1.5)


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


# Lines over α


def _alphas(lines: Sequence[Line], gaps: Gaps, found: Mapping[str, Style]) -> Figure:
    """Draw methods over α with one seed, each mark as large as its α."""
    figure, axes = _plane(": over α, one seed", gaps)
    handles = []
    for line in lines:
        look = _drawn_as(found[line.method]) | {"linestyle": "--" if found[line.method].is_variant else "-"}
        points = [_xy(cell, gaps) for cell in line.cells]
        axes.plot(*zip(*points, strict=True), **look | {"marker": ""}, linewidth=1.6, alpha=0.85, zorder=2)
        for (x, y), cell in zip(points, line.cells, strict=True):
            axes.plot(x, y, markersize=_size(cell.cell.alpha), zorder=2, **look)
        handles.append(_mark(line.method, linewidth=2, markersize=9, **look))
    handles.append(_mark("", linestyle=""))
    alphas = [cell.cell.alpha for line in lines for cell in line.cells]
    for alpha in dict.fromkeys((min(alphas), max(alphas))):
        handles.append(_mark(f"α {alpha:g}", color=FAINT, marker="o", markersize=_size(alpha), linestyle="-"))
    return _finish(figure, axes, gaps, handles)


def _size(alpha: float) -> float:
    return 3 + 9 * alpha
