"""What a study says of its methods: means over seeds, shares of the gap, the front, verdicts. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from cdm_toolkit.compare.table import (
    Column,
    Gap,
    Gaps,
    Mean,
    Text,
    gap_on,
    gaps_of,
    mean_share,
    results_table,
)
from cdm_toolkit.compare.types import CellResult, Ring, StudyResult
from cdm_toolkit.compare.verdicts import Verdict, verdicts

PLANE: tuple[Ring, Ring] = ("inside", "outside")
"""The rings that the trade-off and its Pareto front are drawn over."""


@dataclass(frozen=True, slots=True)
class MethodSummary:
    """A method over its seeds, its lines over alpha aside. Its figures are in the table, under its name."""

    name: str
    cells: tuple[CellResult, ...]
    scores: Mapping[int, float]
    """The mean of the shares of all rings that have one, by seed; none without a gap."""
    on_front: bool
    """No other method is at least as good both inside and outside, and better on one of them."""

    @property
    def score(self) -> Mean | None:
        return Mean.of(list(self.scores.values())) if self.scores else None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those of its first run."""
        return self.cells[0].settings


@dataclass(frozen=True, slots=True)
class Line:
    """A method at several alphas with its first seed, lowest alpha first; its own is among them once it is there."""

    method: str
    cells: tuple[CellResult, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a study says so far."""

    gaps: Gaps
    table: tuple[Column, ...]
    methods: tuple[MethodSummary, ...]
    """Best first, by the mean of the shares; in the order of the study where there is none."""
    lines: tuple[Line, ...]
    verdicts: tuple[Verdict, ...]
    """Of the default against the others, in the order of `methods`."""
    headline: str
    notes: tuple[str, ...]
    """What a reader must know before trusting the figures."""

    def columns(self, *parts: str) -> tuple[Column, ...]:
        """Take parts of the table; of text, all kinds of a ring together."""
        return tuple(each for each in self.table if each.part in parts and each.kind is None)

    def by_kind(self, measure: str) -> tuple[Column, ...]:
        """Take a measure on each kind of text."""
        return tuple(each for each in self.table if each.measure == measure and each.kind is not None)

    @property
    def judged(self) -> tuple[Ring, ...]:
        """The rings with a gap, which methods are judged by."""
        return tuple(ring for ring, gap in self.gaps.items() if gap.is_open)

    @property
    def score_name(self) -> str:
        """What methods are judged by, in words."""
        return "mean of shares" if len(self.judged) != 1 else f"share {self.judged[0]}"


def summarize(result: StudyResult) -> Summary:
    """Reduce a study's cells to what they say of its methods."""
    gaps = gaps_of(result)
    methods = _methods(result, gaps)
    table = results_table(result, {method.name: method.cells for method in methods})
    found = _verdicts(methods, result.default)
    headline = _headline(methods, found, result.default)
    notes = tuple(_notes(result, gaps, methods))
    return Summary(gaps, table, methods, _lines(result), found, headline, notes)


def results_record(result: StudyResult) -> dict[str, Any]:
    """Convert all that was measured and what it says for JSON."""
    summary = summarize(result)
    return asdict(result) | {
        "headline": summary.headline,
        "verdicts": [asdict(verdict) for verdict in summary.verdicts],
        "table": [asdict(column) for column in summary.table],
    }


# Methods


def _by_method(cells: Iterable[CellResult]) -> dict[str, list[CellResult]]:
    """Group cells, in the order of the study."""
    found: defaultdict[str, list[CellResult]] = defaultdict(list)
    for each in sorted(cells, key=lambda each: each.cell.index):
        found[each.cell.method].append(each)
    return dict(found)


def _methods(result: StudyResult, gaps: Gaps) -> tuple[MethodSummary, ...]:
    cells = _by_method(each for each in result.cells if not each.cell.in_curve)
    plane = [Text(ring) for ring in PLANE if ring in gaps]
    front = _front({name: _mean_bits(group, plane) for name, group in cells.items()})
    found = [
        MethodSummary(name, tuple(group), _scores(group, gaps), name in front)
        for name, group in cells.items()
    ]
    return tuple(sorted(found, key=lambda method: -method.score.value if method.score else 0.0))


def _scores(cells: Sequence[CellResult], gaps: Gaps) -> dict[int, float]:
    scores = {each.cell.seed: mean_share(each.scores, gaps) for each in cells}
    return {seed: score for seed, score in scores.items() if score is not None}


def _mean_bits(cells: Sequence[CellResult], plane: Sequence[Text]) -> tuple[float, ...]:
    return tuple(fmean(text.of(each.scores).bits_per_byte for each in cells) for text in plane)


def _front(points: Mapping[str, Sequence[float]]) -> set[str]:
    """Name the methods that no other one is as good as on each axis and better than on one.

    By bits per byte, which order methods as shares of the gap do and are defined where these are not.
    """

    def is_dominated(own: Sequence[float]) -> bool:
        others = (other for other in points.values() if other != own)
        return any(all(b <= a for a, b in zip(own, other, strict=True)) for other in others)

    return {name for name, point in points.items() if not is_dominated(point)}


def _lines(result: StudyResult) -> tuple[Line, ...]:
    curves = _by_method(each for each in result.cells if each.cell.in_curve)
    seeds = {method: cells[0].cell.seed for method, cells in curves.items()}
    points = _by_method(each for each in result.cells if seeds.get(each.cell.method) == each.cell.seed)
    return tuple(
        Line(method, tuple(sorted(cells, key=lambda each: each.cell.alpha)))
        for method, cells in points.items()
    )


# Verdicts


def _verdicts(methods: Sequence[MethodSummary], default: str | None) -> tuple[Verdict, ...]:
    scored = {method.name: method.scores for method in methods if method.scores}
    return verdicts(default, scored) if default in scored else ()


def _headline(methods: Sequence[MethodSummary], found: Sequence[Verdict], default: str | None) -> str:
    """Say in a sentence what came out."""
    if not methods:
        return "No method has been measured yet."
    if default is not None and default not in {method.name for method in methods}:
        return f"{default}, which the others are to be compared with, has not been measured yet."
    if found:
        return f"{default} {_tally(found)}."
    best = methods[0]
    if best.score is None:
        return "The student is no worse than the teacher before training: there is no gap to close."
    return f"{best.name} closes most of the gap: {best.score.written()}."


def _tally(found: Sequence[Verdict]) -> str:
    ahead, behind = sum(each.ahead for each in found), sum(each.behind for each in found)
    level = len(found) - ahead - behind
    said = f"beats {ahead or 'none'} of {len(found)} methods, is behind {behind or 'none'}"
    return said + (f"; no difference is shown to {level}" if level else "")


# Notes


def _notes(result: StudyResult, gaps: Gaps, methods: Sequence[MethodSummary]) -> Iterator[str]:
    if len(result.cells) < result.planned:
        so_far = f"{len(result.cells)} of {result.planned}"
        yield f"{so_far} cells are measured: means and verdicts may change."
    if result.start.select_alpha_on:
        chosen = sorted((each.cells[0].cell for each in methods), key=lambda cell: cell.index)
        alphas = ", ".join(f"{cell.method} {cell.alpha:g}" for cell in chosen)
        yield f"each method at that of its alphas which does best on other rows: {alphas}."
    judged = " and ".join(ring for ring, gap in gaps.items() if gap.is_open)
    for ring, gap in gaps.items():
        if not gap.is_open:
            way = f"are judged by their share {judged}" if judged else "cannot be judged by it"
            yield f"{_no_gap(ring, gap)} Methods {way}."
            continue
        for kind in result.start.on(ring):
            if not (of_kind := gap_on(result, Text(ring, kind))).is_open:
                yield _no_gap(f"{ring}, {kind}", of_kind)


def _no_gap(where: str, gap: Gap) -> str:
    return (
        f"{where}: the student is no worse than the teacher before training ({gap.start:.3f} and {gap.teacher:.3f} "
        "bits per byte), so no share of a gap is defined."
    )
