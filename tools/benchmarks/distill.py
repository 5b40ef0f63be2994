"""Time whole training steps by method, against a step of SFT and the teacher's forward pass."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks._report import Line, Report, medians, once
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.distill.sources import Rows, read_rows
from cdm_toolkit.distill.trainer import DistillTrainer
from cdm_toolkit.distill.training_arguments import training_arguments
from cdm_toolkit.forward import logits_at
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.students import new_student
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd import spelling
from cdm_toolkit.kd.aligned_rows import AlignedRow, align_groups, truncate_aligned
from cdm_toolkit.kd.batch import AlignedBatch
from cdm_toolkit.kd.method import find_method
from cdm_toolkit.kd.rows import Row
from cdm_toolkit.kd.tokenized_rows import TokenizerSide, tokenize_rows, tokenizer_side
from cdm_toolkit.teachers import Local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = Path(__file__).resolve().parents[2] / "cdm_toolkit" / "samples" / "word_problems_train.jsonl"
TEACHER = "smollm2"
STUDENTS = {
    "mistral": ("sft", "spelling", "cdm", "exact", "min-ed", "prefix", "uld", "alm", "gold"),
    TEACHER: ("sft", "kl"),
}
"""The tokenizers of the students, and what is timed on each."""
CELLS = ((1, 128), (4, 256), (16, 128), (2, 1024), (8, 512))
"""Rows, and tokens of the longest side of each."""
STEP = 1.10
"""spelling, at most."""
LEVEL = 1.01
"""spelling against uld, at most: what two steps differ by that do the same."""
SHARE = 3.0
"""Alignment and mapping, at most, in % of spelling's step."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, default=SAMPLE, help="JSONL with question and answer (the sample)"
    )
    parser.add_argument("--size", default="10m", help="parameters of the fresh students (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each step is timed (%(default)s)")


def run(options: argparse.Namespace) -> Report:
    torch.set_num_threads(1)
    rows, teacher = read_rows(options.data), load_model(TEACHER)
    side_t, lines = _side(TEACHER), []
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer, names in STUDENTS.items():
            student = Path(folder) / tokenizer
            new_student(tokenizer, options.size, student)
            steps = {name: Step.of(name, student) for name in names}
            for count, length in CELLS:
                cell = Cell.of(rows, count, length, side_t, _side(tokenizer))
                lines += _lines(cell, steps, teacher, options.rounds)
    facts = {
        "models": f"{TEACHER} → fresh students of {options.size} parameters with the tokenizers of "
        f"{' and '.join(STUDENTS)}; float32, AdamW",
        "text": f"{options.data.name}, rows joined to the lengths; all of a row is labels",
        "timed": f"medians of {options.rounds} rounds in turns, processor time of one thread unless a line says "
        "otherwise; the teacher's forward pass apart, the shorter of two, and added to each step",
    }
    return Report("tools/bench distill (steps, in steps of SFT + the teacher's forward pass)", facts, lines)


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """Rows of one size as features, and the parts of the data step that make them."""

    name: str
    rows: list[AlignedRow]
    data_step: Callable[[], object]
    align: Callable[[], object]

    @classmethod
    def of(
        cls, rows: Sequence[Row], count: int, length: int, teacher: TokenizerSide, student: TokenizerSide
    ) -> Cell:
        """Join rows until each has more than `length` tokens of the student's; the data step cuts them."""
        source = cycle(rows)
        joined = [_joined(source, nth, length, student) for nth in range(count)]

        def tokenized() -> list[Any]:
            sides = (tokenize_rows(side, joined, "none") for side in (teacher, student))
            return list(zip(*sides, strict=True))

        def data_step() -> list[AlignedRow]:
            return [
                truncate_aligned(nth, s, [(t, align_groups(t, s))], length)[0]
                for nth, (t, s) in enumerate(tokenized())
            ]

        there = tokenized()
        return cls(
            f"{student.view.name}, {count} × {length:,}",
            data_step(),
            data_step,
            lambda: [align_groups(t, s) for t, s in there],
        )


def _side(name: str) -> TokenizerSide:
    loaded = load_tokenizer(name)
    return tokenizer_side(loaded.tokenizer, loaded.view)


def _joined(source: Iterator[Row], number: int, length: int, side: TokenizerSide) -> Row:
    text = ""
    while len(side.view.encode(text)) <= length:
        row = next(source)
        text += f"{row.prompt}\n{row.completion}\n\n"
    return Row(number, "", text)


class Computed(nn.Module):
    """A teacher's model whose logits are computed already."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits.unsqueeze(0))

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()

    def forward(self, **_: Any) -> Computed:
        return self


class Step:
    """One optimizer step of a method, on the trainer that a run would have."""

    def __init__(self, trainer: DistillTrainer, *, reads_tokens: bool, vocab_t: int) -> None:
        self.trainer, self.reads_tokens, self.vocab_t = trainer, reads_tokens, vocab_t
        self.parameters = [*trainer.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-5, fused=True)
        self.batch: AlignedBatch | None = None

    @classmethod
    def of(cls, name: str, student: Path) -> Step:
        """Prepare a run, of rows that are only there so that it has some."""
        output = student.with_name(f"{student.name}-{name}")
        teachers = [] if name == "sft" else [{"model": TEACHER, "method": name}]
        config = from_mapping(
            {
                "student": str(student),
                "data": "sample:train",
                "output": str(output),
                "teachers": teachers,
                "train": {"device": "cpu"},
            }
        )
        prepared = prepare(config, Rows(config.data.all_sources), lambda _: None)
        trainer = prepared.trainer(training_arguments(config, output))
        return cls(
            trainer,
            reads_tokens=name != "sft" and find_method(name).reads_teacher_tokens,
            vocab_t=load_tokenizer(TEACHER).view.vocab_size,
        )

    def look_at(self, cell: Cell) -> AlignedBatch | None:
        """Take a cell's batch; gives it where a teacher is asked."""
        (part,) = self.trainer.data_collator(cell.rows)["parts"]
        self.part, self.batch = part, part.batch
        return self.batch if self.trainer.objectives else None

    def hear(self, logits: Tensor) -> None:
        """Take the logits of the teacher's model; to reduce them stays a part of the step."""
        teacher = Local(Computed(logits), vocab=self.vocab_t)
        objectives = self.trainer.objectives
        self.trainer.objectives = tuple(replace(objective, teacher=teacher) for objective in objectives)

    def __call__(self) -> None:
        inputs: Any = {"parts": [self.part]}
        self.trainer.compute_loss(self.trainer.model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True, slots=True)
class Taken:
    """Milliseconds of processor time and by the clock on the wall."""

    processor: float
    wall: float

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.processor + other.processor, self.wall + other.wall)


def _timed(call: Callable[[], object]) -> Taken:
    wall: list[float] = []
    processor = once(lambda: wall.append(once(call, perf_counter)), thread_time)
    return Taken(processor, wall[0])


def _lines(cell: Cell, steps: Mapping[str, Step], teacher: PreTrainedModel, rounds: int) -> Iterator[Line]:
    forward = _ask(cell, steps, teacher)
    taken, mapping = _in_turns(steps, rounds)
    whole = {name: taken[name] + forward[step.reads_tokens] for name, step in steps.items()}
    base = whole["sft"]
    yield Line(f"{cell.name}: a step of SFT", taken["sft"].processor)
    yield Line(f"{cell.name}: the teacher's forward pass", forward[False].processor)
    for name in steps:
        if name != "sft":
            at_most = STEP if name == "spelling" else None
            yield Line(f"{cell.name}: {name}", whole[name].processor / base.processor, "×", at_most)
    if "spelling" not in steps:
        return
    own, uld = whole["spelling"], whole["uld"]
    yield Line(f"{cell.name}: spelling by the clock on the wall", own.wall / base.wall, "×")
    alone = taken["spelling"].processor
    yield Line(f"{cell.name}: spelling against SFT, without the teacher", alone / taken["sft"].processor, "×")
    yield Line(f"{cell.name}: spelling against uld", own.processor / uld.processor, "×", LEVEL)
    data = medians({"align": cell.align, "all": cell.data_step}, rounds, thread_time)
    for what, part in (("alignment", data["align"]), ("mapping", mapping), ("the data step", data["all"])):
        yield Line(f"{cell.name}: {what}, of spelling's step", 100 * part / own.processor, "%")
    both = 100 * (data["align"] + mapping) / own.processor
    yield Line(f"{cell.name}: alignment and mapping", both, "%", SHARE)


def _ask(cell: Cell, steps: Mapping[str, Step], teacher: PreTrainedModel) -> dict[bool, Taken]:
    """Run the teacher for each way to read it, before groups or (True) at whole tokens; gives the times.

    Each is the shorter of two: no medians, which would take longer than all the steps.
    """
    asked = {step.reads_tokens: asks for step in steps.values() if (asks := step.look_at(cell)) is not None}
    logits: dict[bool, Tensor] = {}

    def ask(tokens: bool) -> None:
        logits[tokens] = _logits(teacher, asked[tokens], tokens)

    every = [{tokens: _timed(partial(ask, tokens)) for tokens in asked} for _ in range(2)]
    for step in steps.values():
        step.hear(logits[step.reads_tokens])
    return {
        tokens: Taken(min(one[tokens].processor for one in every), min(one[tokens].wall for one in every))
        for tokens in asked
    }


@torch.no_grad()
def _logits(teacher: PreTrainedModel, batch: AlignedBatch, tokens: bool) -> Tensor:
    (side,) = batch.teachers
    positions = side.token_positions if tokens else side.group_positions
    return logits_at(teacher, teacher.get_output_embeddings(), positions, **side.inputs)


def _in_turns(steps: Mapping[str, Step], rounds: int) -> tuple[dict[str, Taken], float]:
    """Take steps in turns, after one untimed step of each; gives their times, and that of spelling's mapping."""
    mapping: list[float] = []

    def timed(part: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            found: list[Any] = []
            mapping.append(once(lambda: found.append(part(*arguments)), thread_time))
            return found[0]

        return run

    names = ("_positions", "_next_tokens", "merged", "_longer")
    with patch.multiple(spelling, **{name: timed(getattr(spelling, name)) for name in names}):
        for step in steps.values():
            step()
        mapping.clear()
        every = [{name: _timed(step) for name, step in steps.items()} for _ in range(rounds)]
    middle = {
        name: Taken(
            median(one[name].processor for one in every),
            median(one[name].wall for one in every),
        )
        for name in steps
    }
    return middle, sum(mapping) / rounds
