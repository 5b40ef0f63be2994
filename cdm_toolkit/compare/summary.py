"""What a study says of its methods: means over seeds, shares of the gap, the front, verdicts. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, TypeVar

from cdm_toolkit.compare.types import RINGS, CellResult, Measured, Ring, StudyResult
from cdm_toolkit.compare.verdicts import Verdict, verdicts

PLANE: tuple[Ring, Ring] = ("inside", "outside")
"""The rings that the trade-off and its Pareto front are drawn over."""

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over runs of different seeds."""

    value: float
    std: float | None
    """Standard deviation of one run (n − 1); None for a single run."""
    runs: int

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        return Mean(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def written(self, digits: int = 3) -> str:
        """Write it for a person, with its std where it has one."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


@dataclass(frozen=True, slots=True)
class Gap:
    """What there is to gain on some text, in bits per byte: from the student before training to the teacher."""

    start: float
    teacher: float

    @property
    def is_open(self) -> bool:
        """Whether the teacher is the better one. Where it is not, no share of the gap is defined."""
        return self.start > self.teacher

    def share(self, bits_per_byte: float) -> float | None:
        """Return the share that is closed: 0 at the start, 1 at the teacher, below 0 for worse than the start."""
        return (self.start - bits_per_byte) / (self.start - self.teacher) if self.is_open else None


@dataclass(frozen=True, slots=True)
class Run:
    """Where one run came out. A ring without text is in neither mapping; `shares` lacks those without a gap."""

    seed: int
    alpha: float
    bits_per_byte: Mapping[Ring, float]
    shares: Mapping[Ring, float]

    @property
    def score(self) -> float | None:
        """The mean of its shares; None where it has none."""
        return fmean(self.shares.values()) if self.shares else None


@dataclass(frozen=True, slots=True)
class Score:
    """A method on some text, over its seeds."""

    bits_per_byte: Mean
    share: Mean | None
    """Of the gap; None where there is no gap."""
    divergence: Mean | None
    """In nats a shared boundary; None where the study does not measure it."""
    next_word_accuracy: Mean | None
    bits_per_digit: Mean | None
    """None where the text has no digit, and where a version measured that did not count them."""
    agreement: Mean | None
    """Of greedy continuations, as the next two; None where the study has none."""
    written_bits_per_byte: Mean | None
    repetition: Mean | None


@dataclass(frozen=True, slots=True)
class MethodSummary:
    """A method over its seeds, its lines over alpha aside."""

    name: str
    runs: tuple[Run, ...]
    rings: Mapping[Ring, Score]
    """All kinds of a ring together. A ring without text is missing."""
    kinds: Mapping[Ring, Mapping[str, Score]]
    score: Mean | None
    """The mean of the shares of all rings, of those that are defined; None where none is."""
    step_seconds: Mean
    peak_memory: Mean
    """In bytes."""
    matched_mass: Mean | None
    """The teacher's probability that has a partner, over the whole run; None where the method has no such thing."""
    suites: Mapping[str, Mapping[str, Mean]]
    on_front: bool
    """No other method is at least as good both inside and outside, and better on one of them."""
    settings: Mapping[str, Any]
    """Of its first run."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True, slots=True)
class Line:
    """A method at several alphas with its first seed, lowest alpha first; its own is among them once it is there."""

    method: str
    points: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a study says so far."""

    gaps: Mapping[Ring, Gap]
    """All kinds of a ring together. A ring without text is missing."""
    kind_gaps: Mapping[Ring, Mapping[str, Gap]]
    methods: tuple[MethodSummary, ...]
    """Best first, by the mean of the shares; in the order of the study where there is none."""
    lines: tuple[Line, ...]
    verdicts: tuple[Verdict, ...]
    """Of the default against the others, in the order of `methods`."""
    headline: str
    notes: tuple[str, ...]
    """What a reader must know before trusting the figures."""

    @property
    def score_name(self) -> str:
        """What `score` is the mean of, in words."""
        judged = [ring for ring in RINGS if ring in self.gaps and self.gaps[ring].is_open]
        return "mean of shares" if len(judged) != 1 else f"share {judged[0]}"


def summarize(result: StudyResult) -> Summary:
    """Reduce a study's cells to what they say of its methods."""
    gaps = gaps_of(result)
    kind_gaps = _kind_gaps(result)
    methods = _methods(result, gaps, kind_gaps)
    found = _verdicts(methods, result.default)
    return Summary(
        gaps,
        kind_gaps,
        methods,
        _lines(result, gaps),
        found,
        _headline(methods, found, result.default),
        _notes(result, gaps, kind_gaps),
    )


# Text


def gaps_of(result: StudyResult) -> dict[Ring, Gap]:
    together = {ring: (result.start.on(ring), result.teacher.on(ring)) for ring in RINGS}
    return {
        ring: Gap(Measured.sum(start.values()).bits_per_byte, Measured.sum(teacher.values()).bits_per_byte)
        for ring, (start, teacher) in together.items()
        if start
    }


def _kind_gaps(result: StudyResult) -> dict[Ring, dict[str, Gap]]:
    return {
        ring: {
            kind: Gap(measured.bits_per_byte, result.teacher.on(ring)[kind].bits_per_byte)
            for kind, measured in result.start.on(ring).items()
        }
        for ring in RINGS
    }


# Methods


def _grouped(items: Iterable[CellResult], key: Callable[[CellResult], _Key]) -> dict[_Key, list[CellResult]]:
    found: defaultdict[_Key, list[CellResult]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)


def _own_cells(result: StudyResult) -> dict[str, list[CellResult]]:
    """Group the cells that are a method as such, in the order of the study."""
    own = [cell for cell in result.cells if not cell.cell.in_curve]
    own.sort(key=lambda cell: cell.cell.index)
    return _grouped(own, lambda cell: cell.cell.method)


def _methods(
    result: StudyResult, gaps: Mapping[Ring, Gap], kind_gaps: Mapping[Ring, Mapping[str, Gap]]
) -> tuple[MethodSummary, ...]:
    cells = _own_cells(result)
    runs = {name: tuple(run_of(cell, gaps) for cell in group) for name, group in cells.items()}
    front = _front({name: _mean_bits(group) for name, group in runs.items()})
    found = [
        _method(name, cells[name], runs[name], gaps, kind_gaps, on_front=name in front) for name in cells
    ]
    return tuple(sorted(found, key=lambda method: -method.score.value if method.score else 0.0))


def run_of(cell: CellResult, gaps: Mapping[Ring, Gap]) -> Run:
    bits = {ring: Measured.sum(cell.scores.on(ring).values()).bits_per_byte for ring in gaps}
    shares = {ring: gaps[ring].share(bits[ring]) for ring in gaps}
    defined = {ring: share for ring, share in shares.items() if share is not None}
    return Run(cell.cell.seed, cell.cell.alpha, bits, defined)


def _mean_bits(runs: Sequence[Run]) -> tuple[float, ...]:
    """Average the bits per byte of the trade-off's rings, of those that the study has."""
    rings = [ring for ring in PLANE if ring in runs[0].bits_per_byte]
    return tuple(fmean(run.bits_per_byte[ring] for run in runs) for ring in rings)


def _front(points: Mapping[str, Sequence[float]]) -> set[str]:
    """Name the methods that no other one is as good as on each axis and better than on one.

    By bits per byte, which order methods as shares of the gap do and are defined where these are not.
    """

    def is_dominated(name: str) -> bool:
        own = tuple(points[name])
        return any(
            tuple(other) != own and all(b <= a for a, b in zip(own, other, strict=True))
            for other in points.values()
        )

    return {name for name in points if not is_dominated(name)}


def _method(
    name: str,
    cells: Sequence[CellResult],
    runs: tuple[Run, ...],
    gaps: Mapping[Ring, Gap],
    kind_gaps: Mapping[Ring, Mapping[str, Gap]],
    *,
    on_front: bool,
) -> MethodSummary:
    masses = [mass for cell in cells if (mass := _matched_mass(cell)) is not None]
    return MethodSummary(
        name=name,
        runs=runs,
        rings={
            ring: _score([Measured.sum(cell.scores.on(ring).values()) for cell in cells], gap)
            for ring, gap in gaps.items()
        },
        kinds={
            ring: {
                kind: _score([cell.scores.on(ring)[kind] for cell in cells], gap)
                for kind, gap in kind_gaps[ring].items()
            }
            for ring in RINGS
        },
        score=_mean_of_all(run.score for run in runs),
        step_seconds=Mean.of([cell.step_seconds for cell in cells]),
        peak_memory=Mean.of([cell.peak_memory for cell in cells]),
        matched_mass=Mean.of(masses) if masses else None,
        suites=_suites(cells),
        on_front=on_front,
        settings=cells[0].settings,
    )


def _score(measured: Sequence[Measured], gap: Gap) -> Score:
    bits = [each.bits_per_byte for each in measured]
    return Score(
        bits_per_byte=Mean.of(bits),
        share=_mean_of_all(map(gap.share, bits)),
        divergence=_mean_of_all(each.mean_divergence if each.boundaries else None for each in measured),
        next_word_accuracy=_mean_of_all(each.next_word_accuracy for each in measured),
        bits_per_digit=_mean_of_all(each.bits_per_digit for each in measured),
        agreement=_mean_of_all(each.agreement for each in measured),
        written_bits_per_byte=_mean_of_all(each.written_bits_per_byte for each in measured),
        repetition=_mean_of_all(each.repetition for each in measured),
    )


def _mean_of_all(values: Iterable[float | None]) -> Mean | None:
    """Average what all runs have; None where one lacks it."""
    every = list(values)
    found = [value for value in every if value is not None]
    return Mean.of(found) if found and len(found) == len(every) else None


def _matched_mass(cell: CellResult) -> float | None:
    found = [point.matched_mass for point in cell.curve if point.matched_mass is not None]
    return fmean(found) if found else None


def _suites(cells: Sequence[CellResult]) -> dict[str, dict[str, Mean]]:
    """Average each metric that all runs of a method have."""
    return {
        suite: {
            metric: Mean.of([cell.scores.suites[suite][metric] for cell in cells])
            for metric in metrics
            if all(metric in cell.scores.suites.get(suite, {}) for cell in cells)
        }
        for suite, metrics in cells[0].scores.suites.items()
    }


def _lines(result: StudyResult, gaps: Mapping[Ring, Gap]) -> tuple[Line, ...]:
    cells = sorted(result.cells, key=lambda cell: cell.cell.index)
    first_seeds = {cell.cell.method: cell.cell.seed for cell in reversed(cells) if cell.cell.in_curve}
    found = _grouped(cells, lambda cell: (cell.cell.method, cell.cell.seed))
    return tuple(
        Line(method, tuple(sorted((run_of(cell, gaps) for cell in group), key=lambda run: run.alpha)))
        for (method, seed), group in found.items()
        if first_seeds.get(method) == seed
    )


# Verdicts


def _verdicts(methods: Sequence[MethodSummary], default: str | None) -> tuple[Verdict, ...]:
    scored = {method.name: _scores(method) for method in methods if method.score is not None}
    return () if default is None or default not in scored else verdicts(default, scored)


def _scores(method: MethodSummary) -> dict[int, float]:
    return {run.seed: run.score for run in method.runs if run.score is not None}


def _headline(methods: Sequence[MethodSummary], found: Sequence[Verdict], default: str | None) -> str:
    """Say in a sentence what came out."""
    if not methods:
        return "No method has been measured yet."
    if default is not None and default not in {method.name for method in methods}:
        return f"{default}, which the others are to be compared with, has not been measured yet."
    if found:
        return f"{found[0].default} {_tally(found)}."
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


def _notes(
    result: StudyResult, gaps: Mapping[Ring, Gap], kind_gaps: Mapping[Ring, Mapping[str, Gap]]
) -> tuple[str, ...]:
    notes = []
    if len(result.cells) < result.planned:
        so_far = f"{len(result.cells)} of {result.planned}"
        notes.append(f"{so_far} cells are measured: means and verdicts may change.")
    if result.start.select_alpha_on:
        own = {name: cells[0].cell.alpha for name, cells in _own_cells(result).items()}
        chosen = ", ".join(f"{name} {alpha:g}" for name, alpha in own.items())
        notes.append(f"each method at that of its alphas which does best on other rows: {chosen}.")
    for ring, gap in gaps.items():
        if not gap.is_open:
            notes.append(_no_gap(ring, gap) + _judged_by(gaps))
        else:
            kinds = kind_gaps[ring].items()
            notes.extend(_no_gap(f"{ring}, {kind}", each) for kind, each in kinds if not each.is_open)
    return tuple(notes)


def _no_gap(where: str, gap: Gap) -> str:
    return (
        f"{where}: the student is no worse than the teacher before training ({gap.start:.3f} and {gap.teacher:.3f} "
        "bits per byte), so no share of a gap is defined."
    )


def _judged_by(gaps: Mapping[Ring, Gap]) -> str:
    judged = " and ".join(ring for ring, gap in gaps.items() if gap.is_open)
    return f" Methods are judged by their share {judged}." if judged else " Methods cannot be judged by it."
