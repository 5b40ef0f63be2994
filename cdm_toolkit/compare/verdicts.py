"""Whether one method closes more of the gap than others: paired t-tests over seeds, corrected by Holm. Pure."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import sub
from statistics import fmean

SIGNIFICANT, SMALLEST_WRITTEN, CONFIDENCE = 0.05, 0.001, 0.95

Scores = Mapping[int, float]
"""A method's scores by seed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the default stands to another method, by the mean of the shares; above 0: the default closes more.

    Methods are compared at the seeds that both have: a seed fixes the order of the rows for both, so that its luck
    cancels out. One beats the other where the p-value is below 0.05. Without two common seeds nothing is tested.
    """

    default: str
    other: str
    difference: float
    """Mean over the common seeds; that of the means without one."""
    seeds: int
    """That both have."""
    interval: tuple[float, float] | None
    """Of the difference at 95 % confidence, for this comparison by itself; None where nothing is tested."""
    p_value: float | None
    """Of a two-sided paired t-test, corrected by Holm for all comparisons of the study."""

    @property
    def is_significant(self) -> bool:
        return self.p_value is not None and self.p_value < SIGNIFICANT

    @property
    def ahead(self) -> bool:
        return self.is_significant and self.difference > 0

    @property
    def behind(self) -> bool:
        return self.is_significant and self.difference < 0

    @property
    def sign(self) -> str:
        """The verdict at a glance: ▲ ahead, ▼ behind, ≈ no difference shown."""
        return "▲" if self.ahead else "▼" if self.behind else "≈"

    @property
    def text(self) -> str:
        """The verdict as a sentence."""
        if self.is_significant:
            verb = "beats" if self.ahead else "is behind"
            return f"{self.default} {verb} {self.other}: {self._size}, p {self._p}"
        return f"{self.default} and {self.other}, no difference shown: {self._size}"

    @property
    def _p(self) -> str:
        p = self.p_value or 0.0
        return "< 0.001" if p < SMALLEST_WRITTEN else f"= {p:.2g}"

    @property
    def _size(self) -> str:
        interval = "" if self.interval is None else " [{:.3f}, {:.3f}]".format(*self.interval)
        seeds = {0: "no seed in common", 1: "1 seed"}.get(self.seeds, f"{self.seeds} seeds")
        return f"{self.difference:+.3f}{interval}, {seeds}"


def verdicts(default: str, scores: Mapping[str, Scores]) -> tuple[Verdict, ...]:
    """Compare the default with every other method, and correct the p-values for their number."""
    found = [
        compare(default, scores[default], name, others) for name, others in scores.items() if name != default
    ]
    tested = [verdict.p_value for verdict in found if verdict.p_value is not None]
    corrected = iter(holm(tested))
    return tuple(
        verdict if verdict.p_value is None else replace(verdict, p_value=next(corrected)) for verdict in found
    )


def compare(default: str, scores: Scores, other: str, others: Scores) -> Verdict:
    """Compare two methods by their scores by seed; the p-value is that of this comparison alone."""
    seeds = [seed for seed in scores if seed in others]
    if not seeds:
        return Verdict(default, other, fmean(scores.values()) - fmean(others.values()), 0, None, None)
    own, theirs = ([of[seed] for seed in seeds] for of in (scores, others))
    difference = fmean(map(sub, own, theirs))
    tested = _paired_t_test(own, theirs) if len(seeds) > 1 else (None, None)
    return Verdict(default, other, difference, len(seeds), *tested)


def _paired_t_test(own: Sequence[float], others: Sequence[float]) -> tuple[tuple[float, float], float]:
    """Return the interval of the mean difference, and the two-sided p-value of there being none."""
    from scipy.stats import ttest_rel

    first, *more = set(map(sub, own, others))
    if not more:  # no variance, which scipy divides by
        return (first, first), float(first == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that they hardly vary
        found = ttest_rel(own, others)
    low, high = found.confidence_interval(CONFIDENCE)
    return (float(low), float(high)), float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number: the smallest times n, the next times n − 1, none below one before it.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
