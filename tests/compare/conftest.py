"""A study as a real one would come out, made up by a seeded generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp
from random import Random

import pytest

from cdm_toolkit.compare.types import (
    Cell,
    CellResult,
    Continuation,
    Measured,
    ModelScores,
    Point,
    StudyResult,
)

BYTES, BOUNDARIES = 4000, 900
# bits per byte: of the student before training, of the teacher
INSIDE = {"word-problems": (1.62, 0.98), "gsm8k": (1.55, 1.01), "code": (1.71, 0.84)}
OUTSIDE = {"manual": (1.83, 1.12), "headers": (2.41, 1.35)}
# share of the gap closed inside and outside, divergence that is left, seconds a step, memory in MiB, scale of KD
METHODS = {
    "sft": (0.46, 0.12, 0.92, 0.61, 1510, None),
    "exact": (0.55, 0.38, 0.55, 0.94, 1730, 1.1),
    "min-ed": (0.53, 0.35, 0.60, 0.98, 1750, 1.3),
    "prefix": (0.54, 0.40, 0.52, 0.95, 1740, 1.0),
    "uld": (0.47, 0.20, 0.83, 1.21, 2390, 40.0),
    "gold": (0.56, 0.36, 0.57, 1.32, 2410, 0.4),
    "alm": (0.50, 0.33, 0.63, 0.83, 1690, 0.9),
    "cdm": (0.44, 0.18, 0.88, 1.46, 2105, 3.0),
    "spelling": (0.58, 0.42, 0.49, 1.02, 1790, 1.2),
    "spelling k=20": (0.575, 0.405, 0.50, 0.97, 1760, 1.15),
    "spelling any digits": (0.572, 0.422, 0.50, 1.01, 1790, 1.2),
}


def scores(inside: float, outside: float, divergence: float, random: Random | None = None) -> ModelScores:
    """Score a model that closes so much of each gap."""

    def measured(gaps: Mapping[str, tuple[float, float]], share: float) -> dict[str, Measured]:
        found = {}
        for kind, (start, teacher) in gaps.items():
            wobble = random.gauss(0, 0.004) if random else 0.0
            bits = start - (share + wobble) * (start - teacher)
            found[kind] = Measured(bits * BYTES, BYTES, divergence * BOUNDARIES, BOUNDARIES)
        return found

    return ModelScores(measured(INSIDE, inside), measured(OUTSIDE, outside), {})


def cell(name: str, index: int, seed: int, *, alpha: float = 0.5, in_curve: bool = False) -> CellResult:
    """Make up what came of a cell."""
    random = Random(f"{name} {alpha} {seed}")
    inside, outside, divergence, seconds, memory, scale = METHODS[name]
    off = alpha - 0.5
    luck = Random(seed).gauss(0, 0.01)  # that all methods of a seed share
    inside, outside = inside + luck + 0.08 * off - 0.5 * off**2, outside + luck - 0.28 * off - 0.3 * off**2
    curve = tuple(_point(step, inside, scale, random) for step in range(5, 61, 5))
    teachers = [] if name == "sft" else [{"method": name.split()[0], "top_k": 20 if "k=20" in name else 64}]
    return CellResult(
        Cell(index, name, 1.0 if name == "sft" else alpha, seed, in_curve),
        scores(inside, outside, divergence + random.gauss(0, 0.01), random),
        steps=60,
        tokens=17_342,
        step_seconds=seconds * random.uniform(0.97, 1.03),
        peak_memory=int(memory * 2**20 * random.uniform(0.99, 1.01)),
        curve=curve,
        settings={
            "student": "shared/student",
            "alpha": alpha,
            "teachers": teachers,
            "train": {"lr": 1e-4, "batch_size": 2, "schedule": "cosine", "seed": seed},
        },
    )


def _point(step: int, share: float, scale: float | None, random: Random) -> Point:
    fall = exp(-step / 18)
    ce = 3.1 - share + 0.9 * fall + random.gauss(0, 0.05)
    kd = None if scale is None else scale * (0.45 + 0.6 * fall + random.gauss(0, 0.02))
    return Point(step, ce, kd, None if scale is None else 0.93 + random.gauss(0, 0.004))


def study(
    names: Sequence[str] = tuple(METHODS),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    curves: Mapping[str, Sequence[float]] | None = None,
    default: str | None = "spelling",
) -> StudyResult:
    """Make up a study of these methods; variants have one seed."""
    cells: list[CellResult] = []
    for name in names:
        for seed in seeds if " " not in name else seeds[:1]:
            cells.append(cell(name, len(cells), seed))
        for alpha in (curves or {}).get(name, ()):
            cells.append(cell(name, len(cells), seeds[0], alpha=alpha, in_curve=True))
    return StudyResult(
        name="transfer-small",
        about="Tokenizer transfer, a few kinds of text.",
        pair="smollm2 → smollm2 with gpt2's tokenizer (6,000 entries)",
        default=default,
        teacher=scores(1.0, 1.0, 0.0),
        start=scores(0.0, 0.0, 1.62),
        cells=tuple(cells),
        methods=tuple(names),
        planned=len(cells),
        facts={
            "trained on": "word-problems (40 rows), gsm8k (40 rows), code (40 rows)",
            "held out, inside": "word-problems (10 rows), gsm8k (10 rows), code (10 rows)",
            "held out, outside": "manual (10 rows), headers (10 rows)",
            "steps": "60 of 2 rows, 17,342 tokens",
            "seeds": ", ".join(map(str, seeds)),
            "machine": "Linux x86_64, 2 cores, torch 2.13, float32",
            "command": "cdm compare transfer-small -o out",
        },
        provenance={
            "command": "cdm compare transfer-small -o out",
            "made": "2026-01-02T03:04:05+00:00",
            "versions": {"cdm-toolkit": "0.1.0", "python": "3.11.9", "torch": "2.13.0"},
            "fingerprints": {"teacher": "9f3c00aa", "student": "1b77c0de"},
            "seed": None,
            "device": "cpu",
        },
    )


CURVES = {"spelling": (0.1, 0.3, 0.7, 0.9), "gold": (0.1, 0.3, 0.7, 0.9)}


@pytest.fixture(scope="session")
def full_study() -> StudyResult:
    """A study of all methods, with variants and lines over alpha."""
    return study(curves=CURVES)


@pytest.fixture(scope="session")
def make_study() -> Callable[..., StudyResult]:
    """Give the function that makes a study of some methods."""
    return study


@pytest.fixture
def no_gap_outside() -> StudyResult:
    """A study whose student is better than its teacher on the text outside, before training."""
    made = study(("sft", "exact", "spelling"))
    better = {kind: replace(each, bits=each.bits * 0.5) for kind, each in made.start.outside.items()}
    return replace(made, start=replace(made.start, outside=better))


@pytest.fixture
def no_divergence() -> StudyResult:
    """A study that does not measure the divergence."""
    made = study(("sft", "exact", "spelling"))

    def without(scores: ModelScores) -> ModelScores:
        sides = {
            side: {kind: replace(each, divergence=0.0, boundaries=0) for kind, each in measured.items()}
            for side, measured in (("inside", scores.inside), ("outside", scores.outside))
        }
        return replace(scores, **sides)

    cells = tuple(replace(each, scores=without(each.scores)) for each in made.cells)
    return replace(made, start=without(made.start), teacher=without(made.teacher), cells=cells)


@pytest.fixture
def with_near() -> StudyResult:
    """Give a study with text near the domain, where all stand as they do inside; both have words and digits.

    One kind has greedy continuations.
    """
    made = study(("sft", "exact", "spelling"))

    def near(scores: ModelScores, seed: int = 0) -> ModelScores:
        inside = {
            kind: replace(each, words=10, predicted_words=4 + seed, digit_bytes=5, digit_bits=10.0)
            for kind, each in scores.inside.items()
        }
        inside["code"] = replace(inside["code"], agreed_bytes=3, compared_bytes=4 + seed, grams=9)
        said = (Continuation(7, "def <f>(", f"x{seed}): pass & go", True),)
        scores = replace(scores, continuations={"code": said})
        return replace(scores, inside=inside, near={f"{kind} again": each for kind, each in inside.items()})

    cells = tuple(replace(each, scores=near(each.scores, each.cell.seed)) for each in made.cells)
    return replace(made, start=near(made.start), teacher=near(made.teacher), cells=cells)
