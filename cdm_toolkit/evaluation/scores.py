"""Records of an evaluation: finished items, and the scores computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """One finished item: the prompt, the model's output, and its scores.

    All values are JSON types: an item is one line of a results file, and is unchanged by writing and reading.
    """

    key: str
    """Key of the item in the suite."""
    scores: Mapping[str, float]
    """Values by name, such as `exact_match` or `bits`."""
    prompt: str = ""
    generation: str = ""
    reference: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further information, such as the verdict of the sandbox."""
    seconds: float = 0.0
    """Time to score the item, set by `run_suite`."""


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one model: value, standard error and number of items."""

    metric: str
    value: float
    stderr: float | None
    """None where it cannot be estimated, as with one item."""
    n: int
    higher_is_better: bool = True


def mean_score(metric: str, values: Sequence[float], *, higher_is_better: bool = True) -> Score:
    """Average the values of items, with the standard error of the mean.

    >>> mean_score("right", [1.0, 0.0, 1.0, 0.0])
    Score(metric='right', value=0.5, stderr=0.28867513459481287, n=4, higher_is_better=True)
    """
    n = len(values)
    stderr = stdev(values) / math.sqrt(n) if n > 1 else None
    return Score(metric, fmean(values), stderr, n, higher_is_better)


@dataclass(frozen=True, slots=True)
class Summary:
    """Scores of a suite, aggregated over its items."""

    scores: tuple[Score, ...]
    notes: tuple[str, ...] = ()
    """Caveats for a reader of the scores, such as truncated prompts."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """The scores of one model on one suite, with data and settings."""

    suite: str
    model: str
    scores: tuple[Score, ...]
    data: str
    """Source of the scored rows."""
    setting: str
    """How the rows were scored, such as the few-shot examples or the window."""
    seconds: float
    """Time to score the items, summed over all runs that contributed."""
    notes: tuple[str, ...] = ()
    resumed: int = 0
    """Number of items taken from an earlier run."""
