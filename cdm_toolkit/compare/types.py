"""What a study measures, as records: the cells of a grid, models on held-out text, and all together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Ring = Literal["inside", "near", "outside"]
RINGS: tuple[Ring, ...] = ("inside", "near", "outside")
"""Where held-out text lies: of the kinds trained on, near these, far from these."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A model on held-out text. Sums, so that kinds of text add up."""

    bits: float
    """Negative log-likelihood of the scored bytes."""
    scored_bytes: int
    divergence: float
    """KL(teacher ‖ model) in nats, summed over the shared boundaries; 0 for the teacher itself."""
    boundaries: int
    words: int = 0
    """Of the scored bytes; 0 where a version of this toolkit measured that did not count them."""
    predicted_words: int = 0
    """Words whose every token is the model's argmax."""
    digit_bytes: int = 0
    """ASCII digits among the scored bytes."""
    digit_bits: float = 0.0
    """Negative log-likelihood of the tokens that have one of these."""
    agreed_bytes: int = 0
    """Of greedy continuations, until they first differ from the teacher's; 0 as the next ones without these."""
    compared_bytes: int = 0
    """As far as both models have spoken."""
    written_bytes: int = 0
    written_bits: float = 0.0
    """Negative log-likelihood of the continuations under the teacher."""
    repeated_grams: int = 0
    """Sequences of four words that came before in the same continuation."""
    grams: int = 0
    ended_texts: int = 0
    """Continuations that the model ended by itself; of `texts`."""
    texts: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.scored_bytes

    def ratio(self, part: str, whole: str) -> float | None:
        """Divide one of the sums by another; None where there is nothing to divide by."""
        count = getattr(self, whole)
        return getattr(self, part) / count if count else None

    @staticmethod
    def sum(parts: Iterable[Measured]) -> Measured:
        every = tuple(parts)
        return Measured(*(sum(getattr(part, each.name) for part in every) for each in fields(Measured)))


NOTHING = Measured(0.0, 0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model says after a prompt, greedily."""

    row: int
    """Number of the held-out row that the prompt is of."""
    prompt: str
    text: str
    is_cut: bool
    """It reached the limit of tokens: the model has not ended it."""


@dataclass(frozen=True, slots=True)
class ModelScores:
    """A model on the held-out text of each ring, by kind."""

    inside: Mapping[str, Measured]
    outside: Mapping[str, Measured]
    suites: Mapping[str, Mapping[str, float]]
    """Score by metric, of each eval suite that the study names."""
    near: Mapping[str, Measured] = field(default_factory=dict)
    select_alpha_on: Mapping[str, Measured] = field(default_factory=dict)
    """Other rows of these kinds, on which alpha is chosen."""
    continuations: Mapping[str, tuple[Continuation, ...]] = field(default_factory=dict)
    """By kind of text; none where the study has none."""

    def on(self, ring: Ring) -> Mapping[str, Measured]:
        """Return the scores on one ring."""
        scores: Mapping[str, Measured] = getattr(self, ring)
        return scores


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run of a study: an entry of its methods, at one alpha, with one seed."""

    index: int
    """From 0, in the order of the study. No part of what the cell is: a study that grows counts anew."""
    method: str
    """The study's name for the method with its options."""
    alpha: float
    """Weight of cross-entropy; 1 without a teacher."""
    seed: int
    in_curve: bool = False
    """It is one point of a line over alpha, and not the method as such."""

    @property
    def name(self) -> str:
        return f"{self.method}-alpha{self.alpha:g}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Point:
    """Training between two lines of the log, up to `step`; means."""

    step: int
    ce: float | None
    """In nats a label of the data; None where there were samples alone."""
    kd: float | None
    """As the method defines it; None without a teacher."""
    matched_mass: float | None


@dataclass(frozen=True, slots=True)
class CellResult:
    """What came of a cell."""

    cell: Cell
    scores: ModelScores
    steps: int
    tokens: int
    """The student's, over all steps, without padding."""
    step_seconds: float
    """Median time of a step, the teacher's part included."""
    peak_memory: int
    """Bytes: of the process on CPU, of the allocator on CUDA."""
    curve: tuple[Point, ...]
    settings: Mapping[str, Any]
    """Those of the run, as its run file would have them."""
    teacher_tokens: int | None = None
    """That the teacher has read of the rows, or has been cached of; None in cells of earlier versions."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of a step, by part: data, teacher, student, optimizer, sampling; the means of all steps."""


@dataclass(frozen=True, slots=True)
class StudyResult:
    """All that a study has measured so far."""

    name: str
    about: str
    pair: str
    """Teacher → student, for headings."""
    default: str | None
    """The method that the others are compared with."""
    teacher: ModelScores
    start: ModelScores
    """The student before training."""
    cells: tuple[CellResult, ...]
    methods: tuple[str, ...]
    """All of the study, in its order; some may have no cell yet."""
    planned: int
    """Cells of the whole study."""
    facts: Mapping[str, str]
    """What a reader must know: data, steps, tokens, machine, command. In the order to print them."""
    provenance: Mapping[str, Any]
