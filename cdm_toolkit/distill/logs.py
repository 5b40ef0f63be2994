"""What a run logs, and the files of a checkpoint that keep it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cdm_toolkit.errors import BadArtifact

HISTORY = "history.json"
"""The lines that were logged, in a checkpoint."""
EVALUATIONS = "evaluations.json"
"""The evaluations of held-out rows, in a checkpoint of a run that has such rows."""


@dataclass(frozen=True, slots=True)
class TeacherLog:
    """Means over the groups of one teacher since the log before.

    `kd` in nats a group (a distance of probabilities under `uld`); `matched_mass` is the teacher's probability
    on ids that have a match, `pairs` their number at a group, `aligned_share` the groups for each label.
    """

    name: str
    kd: float
    matched_mass: float
    pairs: float
    aligned_share: float


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of an optimizer step, of this process: waiting for rows, the teachers, the student's forward and backward
    pass with the losses, what updates its weights, and the student's sampling."""

    data: float
    teacher: float
    student: float
    optimizer: float
    sampling: float = 0.0


@dataclass(frozen=True, slots=True)
class SampleLog:
    """Means over the texts that the student has sampled and learned since the log before.

    `share` is that of the rows which were samples, `tokens` their mean length, `ended` the share that ended by itself.
    `student_logprob` and `teacher_logprobs` are in nats a byte of the sampled text: what the student gives to it, and
    each teacher. `tokens_per_second` is that of sampling, of this process; None where all were drawn before.
    """

    share: float
    tokens: float
    ended: float
    student_logprob: float
    teacher_logprobs: tuple[float, ...]
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class StepLog:
    """Means over the optimizer steps since the log before, up to `step`.

    `loss` is the objective, `ce` in nats a label of the data's own rows, None where there were samples alone. `tokens`
    are the student's, prompts included and padding not: a sum; `padding` is the share of the student's positions that
    hold none. What lies between steps, such as an evaluation or a checkpoint, is in no `seconds`. `samples` are told of
    in runs with `on_policy`. `teacher_tokens` are those that each teacher's rows have: a sum. Lines of earlier versions
    do not have the last five.
    """

    step: int
    loss: float
    ce: float | None
    teachers: tuple[TeacherLog, ...]
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float | None = None
    padding: float | None = None
    seconds: StepSeconds | None = None
    samples: SampleLog | None = None
    teacher_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EvalLog:
    """The student on the held-out rows, after `step` optimizer steps.

    `loss` is the objective over all rows as if they were one step, None where a teacher could not be asked; `ce` is in
    nats a label. `bits_per_byte` is that of the labels which spell the text over the bytes that they spell: an end of
    text or turn, and what a template writes, count in neither. `teachers` are those that were asked, with means over
    all their groups. `is_best` says that no evaluation before had as little of the metric.
    """

    step: int
    loss: float | None
    ce: float
    bits_per_byte: float
    teachers: tuple[TeacherLog, ...]
    is_best: bool
    seconds: float


def first_to_last(first: float | None, last: float | None) -> str:
    """Write how a figure went on from the first line of a log to the last, where they have it.

    >>> first_to_last(1.5, 1.25), first_to_last(None, 1.25)
    ('1.5000 → 1.2500', 'none → 1.2500')
    """
    return " → ".join("none" if figure is None else f"{figure:.4f}" for figure in (first, last))


def write_logs(
    checkpoint: Path, history: Sequence[StepLog], evaluations: Sequence[EvalLog], rows: str | None
) -> None:
    """Keep what was logged with a checkpoint; `rows` is the fingerprint of the held-out rows, None without any."""
    _write(checkpoint / HISTORY, [asdict(log) for log in history])
    if rows is not None:
        kept = {"rows": rows, "evaluations": [asdict(log) for log in evaluations]}
        _write(checkpoint / EVALUATIONS, kept)


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_history(checkpoint: Path) -> list[StepLog]:
    """Read the lines that were logged up to a checkpoint."""
    lines = json.loads((checkpoint / HISTORY).read_text(encoding="utf-8"))
    return [StepLog(**line | _records(line)) for line in lines]


def _records(line: Mapping[str, Any]) -> dict[str, Any]:
    """Make the records in a line that was read from JSON."""
    seconds, samples = line.get("seconds"), line.get("samples")
    if samples:
        samples = SampleLog(**samples | {"teacher_logprobs": tuple(samples["teacher_logprobs"])})
    return {
        "teachers": _teachers(line),
        "seconds": seconds and StepSeconds(**seconds),
        "samples": samples,
        "teacher_tokens": tuple(line.get("teacher_tokens", ())),
    }


def _teachers(line: Mapping[str, Any]) -> tuple[TeacherLog, ...]:
    return tuple(TeacherLog(**teacher) for teacher in line["teachers"])


def read_evaluations(checkpoint: Path, rows: str) -> list[EvalLog]:
    """Read the evaluations up to a checkpoint. BadArtifact where they are of other rows than those of `rows`."""
    file = checkpoint / EVALUATIONS
    if not file.is_file():
        return []
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept["rows"] != rows:
        fix = "resume with the same `eval` and `data`, or start the run without `resume`"
        raise BadArtifact(checkpoint, "its evaluations are of other held-out rows", fix)
    return [EvalLog(**line | {"teachers": _teachers(line)}) for line in kept["evaluations"]]
