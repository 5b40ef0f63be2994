"""The columns of a study's tables, which a page and a terminal share: what is read, how it is written, what is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cdm_toolkit.compare.summary import SIDES, Gap, Mean, MethodSummary, Score, Side, Summary, on_side
from cdm_toolkit.compare.types import Measured, ModelScores, StudyResult

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
    """Give the columns of the main table: shares, their mean, bits per byte, divergence, cost."""
    sides = tuple(summary.gaps)
    several = sum(gap.is_open for gap in summary.gaps.values()) > 1
    score = Column("share of the gap", "mean", lambda method: method.score, True, 0.0, 1.0)
    shares = [_share(side, summary.gaps[side], partial(_side_score, side)) for side in sides]
    known = [
        *(_bits(side, summary.gaps[side], partial(_side_score, side)) for side in sides),
        *(
            _divergence(side, _measured(result.start, side), partial(_side_score, side))
            for side in sides
            if measures_divergence(result)
        ),
        Column("cost", "s a step", lambda method: method.step_seconds, False),
        Column("cost", "MiB", lambda method: mebibytes(method.peak_memory), False, digits=0),
    ]
    return (*shares, *([score] if several else []), *(replace(column, spreads=False) for column in known))


def by_kind(result: StudyResult, summary: Summary) -> dict[str, tuple[Column, ...]]:
    """Give the columns of the tables by kind of text, by what they have: a column for each kind, grouped by side."""
    kinds = [(side, kind, gap) for side in SIDES for kind, gap in summary.kind_gaps[side].items()]
    found = {
        "Share of the gap closed": tuple(
            _share(kind, gap, partial(_kind_score, side, kind), side) for side, kind, gap in kinds
        ),
        "Bits per byte": tuple(
            _bits(kind, gap, partial(_kind_score, side, kind), side) for side, kind, gap in kinds
        ),
    }
    if measures_divergence(result):
        found["KL(teacher ‖ student), nats a shared boundary"] = tuple(
            _divergence(kind, on_side(result.start, side)[kind], partial(_kind_score, side, kind), side)
            for side, kind, _ in kinds
        )
    return found


def measures_divergence(result: StudyResult) -> bool:
    """Whether a study measures it: otherwise there are no boundaries."""
    return any(part.boundaries for side in SIDES for part in on_side(result.start, side).values())


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


def _share(name: str, gap: Gap, score: _Read, group: str = "share of the gap") -> Column:
    ends = (0.0, 1.0) if gap.is_open else (None, None)
    return Column(group, name, lambda method: score(method).share, True, *ends)


def _bits(name: str, gap: Gap, score: _Read, group: str = "bits per byte") -> Column:
    return Column(group, name, lambda method: score(method).bits_per_byte, False, gap.start, gap.teacher)


def _divergence(name: str, start: Measured, score: _Read, group: str = "KL, nats") -> Column:
    return Column(group, name, lambda method: score(method).divergence, False, start.mean_divergence, 0.0)


def _side_score(side: Side, method: MethodSummary) -> Score:
    return method.sides[side]


def _kind_score(side: Side, kind: str, method: MethodSummary) -> Score:
    return method.kinds[side][kind]


def _metric(suite: str, metric: str, method: MethodSummary) -> Mean | None:
    return method.suites.get(suite, {}).get(metric)


def _measured(scores: ModelScores, side: Side) -> Measured:
    return Measured.sum(on_side(scores, side).values())
