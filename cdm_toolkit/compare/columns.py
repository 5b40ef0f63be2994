"""The columns of a study's tables, which a page and a terminal share: what is read, how it is written, what is best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cdm_toolkit.compare.summary import Gap, Mean, MethodSummary, Score, Summary
from cdm_toolkit.compare.types import RINGS, Measured, Ring, StudyResult

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of every method, with those of the start and of the teacher where they have it."""

    group: str
    name: str
    read: Callable[[MethodSummary], Mean | None]
    highest_is_best: bool
    start: float | None = None
    teacher: float | None = None
    digits: int = 3
    spreads: bool = True
    """Whether its std is worth the room."""

    def written(self, method: MethodSummary, *, spread: bool = True) -> str:
        """Write a method's figure, with its std where `spread` allows it and there is one."""
        mean = self.read(method)
        if mean is None:
            return MISSING
        if mean.std is None or not (spread and self.spreads):
            return self._number(mean.value)
        return f"{self._number(mean.value)} ± {self._number(mean.std)}"

    def end(self, value: float | None) -> str:
        """Write the figure of the start or of the teacher."""
        return MISSING if value is None else self._number(value)

    def best(self, methods: Sequence[MethodSummary]) -> frozenset[str]:
        """Name the methods that no other one is better than in this column, as it is written; none of one."""
        values = {method.name: mean.value for method in methods if (mean := self.read(method)) is not None}
        if len(values) < 2:
            return frozenset()
        top = self._number(max(values.values()) if self.highest_is_best else min(values.values()))
        return frozenset(name for name, value in values.items() if self._number(value) == top)

    def _number(self, value: float) -> str:
        return f"{value:,.{self.digits}f}"


def overview(result: StudyResult, summary: Summary) -> tuple[Column, ...]:
    """Give the columns of the main table: shares, their mean, all that is measured on text, cost."""
    rings = tuple(summary.gaps)
    several = sum(gap.is_open for gap in summary.gaps.values()) > 1
    score = Column("share of the gap", "mean", lambda method: method.score, True, 0.0, 1.0)
    shares = [_share(ring, summary.gaps[ring], partial(_ring_score, ring)) for ring in rings]
    known = [
        *_by_ring(result, summary, _QUANTITIES),
        Column("cost", "s a step", lambda method: method.step_seconds, False),
        Column("cost", "MiB", lambda method: mebibytes(method.peak_memory), False, digits=0),
    ]
    return (*shares, *([score] if several else []), *(replace(column, spreads=False) for column in known))


def continuations(result: StudyResult, summary: Summary) -> tuple[Column, ...]:
    """Give the columns of the table of greedy continuations; none where the study has none."""
    return tuple(_by_ring(result, summary, _OF_CONTINUATIONS))


def _by_ring(result: StudyResult, summary: Summary, quantities: Sequence[_Quantity]) -> Iterator[Column]:
    for quantity in _measured(summary, quantities):
        for ring in summary.gaps:
            yield _column(quantity, quantity.name, ring, partial(_ring_score, ring), _together(result, ring))


def by_kind(result: StudyResult, summary: Summary) -> dict[str, tuple[Column, ...]]:
    """Give the columns of the tables by kind of text, by what they have: a column for each kind, grouped by ring."""
    kinds = [(ring, kind, gap) for ring in RINGS for kind, gap in summary.kind_gaps[ring].items()]
    found = {
        "Share of the gap closed": tuple(
            _share(kind, gap, partial(_kind_score, ring, kind), ring) for ring, kind, gap in kinds
        )
    }
    for quantity in _measured(summary, (*_QUANTITIES, *_OF_CONTINUATIONS)):
        found[quantity.title] = tuple(
            _column(quantity, ring, kind, partial(_kind_score, ring, kind), _ends(result, ring, kind))
            for ring, kind, _ in kinds
        )
    return found


def suites(result: StudyResult) -> tuple[Column, ...]:
    """Give a column for each metric of each eval suite, as the student had it before training."""
    return tuple(
        Column(
            suite,
            metric,
            partial(_metric, suite, metric),
            True,
            value,
            result.teacher.suites.get(suite, {}).get(metric),
        )
        for suite, metrics in result.start.suites.items()
        for metric, value in metrics.items()
    )


def mebibytes(size: Mean) -> Mean:
    """Convert a mean of bytes to MiB."""
    return Mean(size.value / 2**20, None if size.std is None else size.std / 2**20, size.runs)


_Read = Callable[[MethodSummary], Score]
_Ends = tuple[Measured, Measured]
"""The start and the teacher on some text."""


@dataclass(frozen=True, slots=True)
class _Quantity:
    """What is measured on text, beside the share of the gap."""

    name: str
    title: str
    """Of its table by kind of text."""
    read: Callable[[Score], Mean | None]
    of_end: Callable[[Measured], float | None]
    highest_is_best: bool = False


_QUANTITIES = (
    _Quantity(
        "bits per byte", "Bits per byte", lambda score: score.bits_per_byte, lambda end: end.bits_per_byte
    ),
    _Quantity(
        "KL, nats",
        "KL(teacher ‖ student), nats a shared boundary",
        lambda score: score.divergence,
        lambda end: end.mean_divergence,
    ),
    _Quantity(
        "next word",
        "Next-word accuracy",
        lambda score: score.next_word_accuracy,
        lambda end: end.next_word_accuracy,
        highest_is_best=True,
    ),
    _Quantity(
        "bits a digit", "Bits a digit", lambda score: score.bits_per_digit, lambda end: end.bits_per_digit
    ),
)


_OF_CONTINUATIONS = (
    _Quantity(
        "agreement with the teacher",
        "Agreement of greedy continuations with the teacher's",
        lambda score: score.agreement,
        lambda end: end.agreement,
        highest_is_best=True,
    ),
    _Quantity(
        "bits per byte by the teacher",
        "Bits per byte of greedy continuations by the teacher",
        lambda score: score.written_bits_per_byte,
        lambda end: end.written_bits_per_byte,
    ),
    _Quantity(
        "repetition",
        "Repetition in greedy continuations",
        lambda score: score.repetition,
        lambda end: end.repetition,
    ),
)


def _measured(summary: Summary, quantities: Sequence[_Quantity] = _QUANTITIES) -> list[_Quantity]:
    """Take what the study has measured for some method."""
    scores = [score for method in summary.methods for score in method.rings.values()]
    return [quantity for quantity in quantities if any(quantity.read(score) for score in scores)]


def _share(name: str, gap: Gap, score: _Read, group: str = "share of the gap") -> Column:
    ends = (0.0, 1.0) if gap.is_open else (None, None)
    return Column(group, name, lambda method: score(method).share, True, *ends)


def _column(quantity: _Quantity, group: str, name: str, score: _Read, ends: _Ends) -> Column:
    start, teacher = map(quantity.of_end, ends)
    highest = quantity.highest_is_best
    return Column(group, name, lambda method: quantity.read(score(method)), highest, start, teacher)


def _together(result: StudyResult, ring: Ring) -> _Ends:
    start, teacher = (Measured.sum(scores.on(ring).values()) for scores in (result.start, result.teacher))
    return start, teacher


def _ends(result: StudyResult, ring: Ring, kind: str) -> _Ends:
    return result.start.on(ring)[kind], result.teacher.on(ring)[kind]


def _ring_score(ring: Ring, method: MethodSummary) -> Score:
    return method.rings[ring]


def _kind_score(ring: Ring, kind: str, method: MethodSummary) -> Score:
    return method.kinds[ring][kind]


def _metric(suite: str, metric: str, method: MethodSummary) -> Mean | None:
    return method.suites.get(suite, {}).get(metric)
