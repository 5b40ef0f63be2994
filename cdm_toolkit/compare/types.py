"""What a study measures, as records: the cells of a grid, models on held-out text, and all together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measured:
    """A model on held-out text. Sums, so that kinds of text add up."""

    bits: float
    """Negative log-likelihood of the scored bytes."""
    scored_bytes: int
    divergence: float
    """KL(teacher ‖ model) in nats, summed over the shared boundaries; 0 for the teacher itself."""
    boundaries: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.scored_bytes

    @property
    def mean_divergence(self) -> float:
        """In nats a shared boundary; 0 without one."""
        return self.divergence / max(self.boundaries, 1)

    @staticmethod
    def sum(parts: Iterable[Measured]) -> Measured:
        every = tuple(parts)
        return Measured(
            sum(part.bits for part in every),
            sum(part.scored_bytes for part in every),
            sum(part.divergence for part in every),
            sum(part.boundaries for part in every),
        )


@dataclass(frozen=True, slots=True)
class ModelScores:
    """A model on text of the kinds that it is trained on (inside) and of others (outside), by kind."""

    inside: Mapping[str, Measured]
    outside: Mapping[str, Measured]
    suites: Mapping[str, Mapping[str, float]]
    """Score by metric, of each eval suite that the study names."""


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
    ce: float
    """In nats a label."""
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
