"""What an evaluation gives back: finished items, and the scores made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """Hold one finished item: what the model was asked, what it gave, and what that is worth.

    All values are such as JSON has: an item is one line of a results file, and comes back from it as it was.
    """

    key: str
    """Which of the suite's items it is."""
    scores: Mapping[str, float]
    """What is counted, by name, such as `exact_match` or `bits`."""
    prompt: str = ""
    generation: str = ""
    reference: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a reader may want besides, such as the verdict of a sandbox."""
    seconds: float = 0.0
    """Time it took, which whoever runs the suite measures."""


@dataclass(frozen=True, slots=True)
class Score:
    """Hold one metric of one model: its value, its standard error and the number of items."""

    metric: str
    value: float
    stderr: float | None
    """None where it cannot be estimated, as with one item."""
    n: int
    higher_is_better: bool = True


def mean_score(metric: str, values: Sequence[float], *, higher_is_better: bool = True) -> Score:
    """Average one value an item, with the standard error of the mean.

    >>> mean_score("right", [1.0, 0.0, 1.0, 0.0])
    Score(metric='right', value=0.5, stderr=0.28867513459481287, n=4, higher_is_better=True)
    """
    n = len(values)
    stderr = stdev(values) / math.sqrt(n) if n > 1 else None
    return Score(metric, fmean(values), stderr, n, higher_is_better)


@dataclass(frozen=True, slots=True)
class Summary:
    """Hold what all items of a suite come to."""

    scores: tuple[Score, ...]
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know, such as prompts that were cut."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """Hold the scores of one model on one suite, and what they rest on."""

    suite: str
    model: str
    scores: tuple[Score, ...]
    data: str
    """Where the scored rows come from."""
    setting: str
    """How they were scored, such as the few-shot examples or the window."""
    seconds: float
    """Time that scoring the items took, over all runs that had a part in it."""
    notes: tuple[str, ...] = ()
    resumed: int = 0
    """Items that an earlier run had finished."""
