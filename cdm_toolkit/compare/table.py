"""All results of a study as one table: each measure of each method on each text, over its seeds. Pure.

The terminal, the page and `results.json` show columns of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from cdm_toolkit.compare.types import RINGS, CellResult, Measured, ModelScores, Ring, StudyResult

MISSING = "–"
SHARE, DIVERGENCE = "share of the gap", "KL, nats"
MEAN = "mean"
"""The column with the mean of the shares of all rings."""


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

    def written(self, digits: int = 3, *, spread: bool = True) -> str:
        """Write it for a person, with its std where it has one and `spread` allows it."""
        std = f" ± {self.std:,.{digits}f}" if spread and self.std is not None else ""
        return f"{self.value:,.{digits}f}{std}"


# Texts and gaps


class Text(NamedTuple):
    """Held-out text: one kind of a ring, or all of its kinds together."""

    ring: Ring
    kind: str | None = None

    def of(self, scores: ModelScores) -> Measured:
        """Return what a model scores on it."""
        by_kind = scores.on(self.ring)
        return Measured.sum(by_kind.values()) if self.kind is None else by_kind[self.kind]


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


Gaps = Mapping[Ring, Gap]
"""Of all kinds of a ring together. A ring without text is missing."""


def gap_on(result: StudyResult, text: Text) -> Gap:
    return Gap(text.of(result.start).bits_per_byte, text.of(result.teacher).bits_per_byte)


def gaps_of(result: StudyResult) -> dict[Ring, Gap]:
    return {ring: gap_on(result, Text(ring)) for ring in RINGS if result.start.on(ring)}


def shares(scores: ModelScores, gaps: Gaps) -> dict[Ring, float]:
    """Return the shares that a model closes, of the rings with a gap."""
    found = {ring: gap.share(Text(ring).of(scores).bits_per_byte) for ring, gap in gaps.items()}
    return {ring: share for ring, share in found.items() if share is not None}


def mean_share(scores: ModelScores, gaps: Gaps) -> float | None:
    """Return what methods are judged by: the mean of the shares; None where none is defined."""
    found = shares(scores, gaps)
    return fmean(found.values()) if found else None


# Measures


class Measure(NamedTuple):
    """A figure of a model on some text: one of its sums over another."""

    name: str
    title: str
    """Of its table by kind of text."""
    ratio: tuple[str, str]
    """Of the fields of `Measured`."""
    highest_is_best: bool = False
    of_continuations: bool = False


MEASURES = (
    Measure(SHARE, "Share of the gap closed", ("bits", "scored_bytes"), highest_is_best=True),
    Measure("bits per byte", "Bits per byte", ("bits", "scored_bytes")),
    Measure(DIVERGENCE, "KL(teacher ‖ student), nats a shared boundary", ("divergence", "boundaries")),
    Measure("next word", "Next-word accuracy", ("predicted_words", "words"), highest_is_best=True),
    Measure("bits a digit", "Bits a digit", ("digit_bits", "digit_bytes")),
    Measure(
        "agreement with the teacher",
        "Agreement of greedy continuations with the teacher's",
        ("agreed_bytes", "compared_bytes"),
        highest_is_best=True,
        of_continuations=True,
    ),
    Measure(
        "bits per byte by the teacher",
        "Bits per byte of greedy continuations by the teacher",
        ("written_bits", "written_bytes"),
        of_continuations=True,
    ),
    Measure(
        "repetition",
        "Repetition in greedy continuations",
        ("repeated_grams", "grams"),
        of_continuations=True,
    ),
    Measure(
        "ended",
        "Greedy continuations that the model ended by itself",
        ("ended_texts", "texts"),
        highest_is_best=True,
        of_continuations=True,
    ),
)


# The table


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of every method, with those of the start and of the teacher where they have it."""

    part: Literal["text", "continuations", "suites", "cost"]
    measure: str
    """Of a suite: its name."""
    name: str
    """The ring, or which figure of the suite or of the cost it is."""
    kind: str | None
    """Of text; None for all kinds of the ring together."""
    highest_is_best: bool | None
    """None where none is better than another."""
    means: Mapping[str, Mean]
    """By method; those that lack it are missing."""
    start: float | None = None
    teacher: float | None = None
    digits: int = 3

    @property
    def heads(self) -> tuple[str, str]:
        """What it is headed by: what several columns have in common, and its own name."""
        return (self.measure, self.name) if self.kind is None else (self.name, self.kind)

    def written(self, method: str, *, spread: bool = True) -> str:
        """Write a method's figure, with its std where `spread` allows it and there is one."""
        mean = self.means.get(method)
        return MISSING if mean is None else mean.written(self.digits, spread=spread)

    def end(self, value: float | None) -> str:
        """Write the figure of the start or of the teacher."""
        return MISSING if value is None else f"{value:,.{self.digits}f}"

    @property
    def best(self) -> frozenset[str]:
        """The methods that no other one is better than, as it is written; none of one."""
        if len(self.means) < 2 or self.highest_is_best is None:
            return frozenset()
        top = (max if self.highest_is_best else min)(mean.value for mean in self.means.values())
        return frozenset(name for name, mean in self.means.items() if self.end(mean.value) == self.end(top))


Cells = Mapping[str, Sequence[CellResult]]
"""The cells of each method as such, over its seeds."""


def results_table(result: StudyResult, cells: Cells) -> tuple[Column, ...]:
    """Put all figures together: by measure, then by ring, all kinds before each; then suites, then cost."""
    return (*_of_text(result, cells), *_of_suites(result, cells), *_of_cost(cells))


def _of_text(result: StudyResult, cells: Cells) -> Iterator[Column]:
    rings = [ring for ring in RINGS if result.start.on(ring)]
    texts = [Text(ring, kind) for ring in rings for kind in (None, *result.start.on(ring))]
    for measure in MEASURES:
        found = [_on_text(result, cells, measure, text) for text in texts]
        if measure.name == SHARE:
            yield from (*found, *_mean_of_shares(result, cells))
        elif any(column.means for column in found):
            yield from found


def _on_text(result: StudyResult, cells: Cells, measure: Measure, text: Text) -> Column:
    gap = gap_on(result, text)

    def read(scores: ModelScores) -> float | None:
        found = text.of(scores).ratio(*measure.ratio)
        return gap.share(found) if found is not None and measure.name == SHARE else found

    return Column(
        "continuations" if measure.of_continuations else "text",
        measure.name,
        text.ring,
        text.kind,
        measure.highest_is_best,
        _means(cells, lambda cell: read(cell.scores)),
        read(result.start),
        0.0 if measure.name == DIVERGENCE else read(result.teacher),
    )


def _mean_of_shares(result: StudyResult, cells: Cells) -> Iterator[Column]:
    """Give the column that methods are judged by, where several rings have a gap."""
    gaps = gaps_of(result)
    if sum(gap.is_open for gap in gaps.values()) > 1:
        means = _means(cells, lambda cell: mean_share(cell.scores, gaps))
        yield Column("text", SHARE, MEAN, None, True, means, 0.0, 1.0)


def _of_suites(result: StudyResult, cells: Cells) -> Iterator[Column]:
    """Give a column for each metric of each suite, as the student had it before training."""
    for suite, metrics in result.start.suites.items():
        for metric in metrics:
            yield _of_metric(result, cells, suite, metric)


def _of_metric(result: StudyResult, cells: Cells, suite: str, metric: str) -> Column:
    def read(scores: ModelScores) -> float | None:
        return scores.suites.get(suite, {}).get(metric)

    means = _means(cells, lambda cell: read(cell.scores))
    return Column("suites", suite, metric, None, True, means, read(result.start), read(result.teacher))


def _of_cost(cells: Cells) -> Iterator[Column]:
    seconds = _means(cells, lambda cell: cell.step_seconds)
    memory = _means(cells, lambda cell: cell.peak_memory / 2**20)
    yield Column("cost", "cost", "s a step", None, False, seconds)
    sampling = _means(cells, lambda cell: cell.seconds.get("sampling"))
    if any(mean.value for mean in sampling.values()):  # on-policy methods learn from texts of their own
        yield Column("cost", "cost", "s a step, sampling", None, False, sampling)
        yield Column("cost", "cost", "s a step, teacher", None, False, _means(cells, _teacher_seconds))
        student = _means(cells, lambda cell: float(cell.tokens))
        yield Column("cost", "cost", "student's tokens", None, None, student, digits=0)
        teacher = _means(cells, lambda cell: cell.teacher_tokens)
        yield Column("cost", "cost", "teacher's tokens", None, None, teacher, digits=0)
    yield Column("cost", "cost", "MiB", None, False, memory, digits=0)
    if mass := _means(cells, _matched_mass):
        yield Column("cost", "cost", "matched mass", None, None, mass)


def _teacher_seconds(cell: CellResult) -> float | None:
    return cell.seconds.get("teacher")


def _matched_mass(cell: CellResult) -> float | None:
    """Average the teacher's probability that has a partner; None where the method has no such thing."""
    found = [point.matched_mass for point in cell.curve if point.matched_mass is not None]
    return fmean(found) if found else None


def _means(cells: Cells, read: Callable[[CellResult], float | None]) -> dict[str, Mean]:
    """Average a figure of each method over its runs; one that some run lacks is left out."""
    found = {}
    for method, of_method in cells.items():
        values = [value for cell in of_method if (value := read(cell)) is not None]
        if values and len(values) == len(of_method):
            found[method] = Mean.of(values)
    return found
