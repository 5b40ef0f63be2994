"""Time steps of TRL's GOLD, of GOLD with a loss of the toolkit, and of `cdm distill`, on the same models and rows."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks import _steps
from benchmarks._report import Line, Report
from benchmarks.distill import TEACHER
from cdm_toolkit import kd
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.distill.sources import Rows, read_rows
from cdm_toolkit.distill.training_arguments import training_arguments
from cdm_toolkit.errors import MissingExtra
from cdm_toolkit.hub.models import model_folder
from cdm_toolkit.hub.students import new_student, transplant
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.integrations.trl import GoldLoss, set_loss

MAX_LENGTH = 512
APART = 1e-4
"""Losses that both define, at most: sums over all ids in float32, in another order."""
DIVERGENCES: dict[float, Callable[..., kd.Method[Any, Any]]] = {
    0.0: kd.KL,
    0.5: partial(kd.JSD, beta=0.5),
    1.0: kd.ReverseKL,
}
"""By the beta of TRL's generalised JSD."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", default="gpt2", help="the student's, byte-level for GOLD (%(default)s)"
    )
    parser.add_argument("--method", default="spelling", help="the toolkit's (%(default)s)")
    parser.add_argument(
        "--on-policy",
        type=int,
        metavar="TOKENS",
        help="sample every answer, of at most so many tokens, in place of learning those of the rows",
    )
    _steps.add_options(parser, rows=16)
    parser.set_defaults(batch_size=4)


def run(options: argparse.Namespace) -> Report:
    if find_spec("trl") is None:
        raise MissingExtra("TRL", "trl", "tools/bench trl")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        transplant(TEACHER, load_tokenizer(options.tokenizer), folder / "student")
        new_student(TEACHER, "10m", folder / "same-tokenizer")
        contestants: dict[str, Callable[[], Any]] = {
            "GOLD": partial(gold_trainer, folder, options),
            f"GOLD with {options.method}": partial(gold_with_method, folder, options),
            "cdm distill": partial(distill_trainer, folder, options),
        }
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for name, make in contestants.items():
                taken[name] += steps_of(make())
        lines = _step_lines({name: median(each) for name, each in taken.items()})
        lines += _loss_lines(folder, options)
    facts = {
        "models": f"{TEACHER}, float32; the student is its body with the tokenizer {options.tokenizer}; for the losses "
        f"one of 10 M parameters with the tokenizer of {TEACHER}",
        "rows": f"{options.rows} of {options.data.name}, {options.batch_size} a step, "
        + (
            "those of the file"
            if options.on_policy is None
            else f"sampled, of {options.on_policy} tokens at most"
        ),
        "timed": "steps of the trainers' own loops, one thread; medians of all but the first of each of "
        f"{options.rounds} epochs in turns",
        "settings": "AdamW, batches of any rows, no checkpoints of activations; GOLD with its hybrid loss",
    }
    return Report("tools/bench trl", facts, lines)


def _step_lines(seconds: dict[str, float]) -> list[Line]:
    ours = seconds["cdm distill"]
    lines = [Line(f"a step of {name}", 1e3 * each) for name, each in seconds.items()]
    return lines + [
        Line(f"{name} over cdm distill", each / ours, "×") for name, each in seconds.items() if each != ours
    ]


def _loss_lines(folder: Path, options: argparse.Namespace) -> list[Line]:
    """Evaluate what both define: divergences of two models of one tokenizer, over all ids."""
    student = folder / "same-tokenizer"
    theirs = gold_trainer(folder, options, student, use_uld_loss=False)
    ours = gold_trainer(folder, options, student)
    pair, lines = set_loss(ours, kd.KL).method.pair, []
    for beta, divergence in DIVERGENCES.items():
        method = divergence(pair, top_k=pair.vocab_s)
        theirs.beta, ours.uld_loss_fn = beta, GoldLoss(method)
        for trainer in (theirs, ours):
            trainer.remove_callback(PrinterCallback)
        of_trl, here = (float(trainer.evaluate()["eval_loss"]) for trainer in (theirs, ours))
        lines.append(Line(f"{method.name} of TRL", of_trl, "nats"))
        lines.append(Line(f"{method.name} here, less TRL's", abs(here - of_trl), "nats", APART))
    return lines


# The trainers


def gold_trainer(
    folder: Path, options: argparse.Namespace, student: Path | None = None, **settings: Any
) -> Any:
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    disable_progress_bars()
    student = student or folder / "student"
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = read_rows(options.data)[: options.rows]
    texts = Dataset.from_list([{"prompt": f"{row.prompt}\n", "completion": row.completion} for row in rows])
    sampled = {"lmbda": 0.0}
    if options.on_policy is not None:
        sampled = {"lmbda": 1.0, "max_completion_length": options.on_policy}
    loss = {"use_uld_loss": True, "uld_use_hybrid_loss": True, "temperature": 1.0}
    size = {f"per_device_{phase}_batch_size": options.batch_size for phase in ("train", "eval")}
    loop = {"num_train_epochs": 1, "learning_rate": 2e-5, "max_length": MAX_LENGTH, "use_cpu": True}
    without = {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "report_to": "none"}
    without |= {"logging_strategy": "no", "save_strategy": "no"}
    args = GOLDConfig(str(folder / "gold"), **(sampled | loss | size | loop | without | settings))
    teacher = str(model_folder(TEACHER))
    return GOLDTrainer(
        str(student), teacher, args, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer
    )


def gold_with_method(folder: Path, options: argparse.Namespace) -> Any:
    trainer = gold_trainer(folder, options)
    set_loss(trainer, kd.find_method(options.method))
    return trainer


def distill_trainer(folder: Path, options: argparse.Namespace) -> Any:
    train = {"device": "cpu", "batch_size": options.batch_size, "group_by_length": False, "save_every": 0}
    settings: dict[str, Any] = {
        "student": str(folder / "student"),
        "data": {"path": str(options.data), "limit": options.rows, "max_length": MAX_LENGTH},
        "output": str(folder / "out"),
        "teachers": [{"model": TEACHER, "method": options.method}],
        "train": train,
    }
    if options.on_policy is not None:
        settings["on_policy"] = {"share": 1.0, "max_new_tokens": options.on_policy}
    config = from_mapping(settings)
    prepared = prepare(config, Rows(config.data.all_sources), lambda _: None)
    return prepared.trainer(training_arguments(config, folder / "out"))


class Clock(TrainerCallback):
    """The times at which an epoch begins, and its steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(perf_counter())


def steps_of(trainer: Any) -> list[float]:
    """Train for an epoch, and give the seconds of each step after the first, with its data."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    first, *others = (after - before for before, after in pairwise(clock.times))
    return others or [first]
