"""What an evaluation gives back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """Hold one metric of one model: its value, standard error, number of items and the seconds it took."""

    metric: str
    value: float
    stderr: float | None
    """None where it cannot be estimated, as with one item."""
    n: int
    seconds: float
    higher_is_better: bool


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
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know, such as prompts that were cut."""
