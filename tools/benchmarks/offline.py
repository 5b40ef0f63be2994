"""Time the steps of a run whose teacher is a cache, against those of SFT on the same rows."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import thread_time
from typing import Any

import torch

from benchmarks._report import Line, Report, medians
from benchmarks.distill import SAMPLE, TEACHER
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.distill.trainer import DistillTrainer, training_arguments
from cdm_toolkit.distill.write_teacher_cache import CacheSettings, write_cache
from cdm_toolkit.hub.students import transplant
from cdm_toolkit.hub.tokenizers import load_tokenizer

OFFLINE = 1.05
"""A step with a cached teacher over one of SFT, at most."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, default=SAMPLE, help="JSONL with question and answer (the sample)"
    )
    parser.add_argument("--methods", nargs="+", default=["spelling"], help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="how many are trained on (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the rows are timed (%(default)s)")


def run(options: argparse.Namespace) -> Report:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        transplant(TEACHER, load_tokenizer("mistral"), folder / "student")
        cache = CacheSettings(
            model=TEACHER,
            data=str(options.data),
            output=str(folder / "cache"),
            limit=options.rows,
            device="cpu",
        )
        write_cache(cache)
        epochs = {name: _epoch(name, folder, options) for name in ("sft", *options.methods)}
        taken = medians(epochs, options.rounds, thread_time)
    steps = -(-options.rows // options.batch_size)
    lines = [Line("a step of SFT", taken["sft"] / steps)]
    lines += [
        Line(f"{name} over SFT", taken[name] / taken["sft"], "×", OFFLINE if name == "spelling" else None)
        for name in options.methods
    ]
    facts = {
        "models": f"{TEACHER}, cached with k = {cache.k}; the student is its body with Mistral's tokenizer; float32",
        "rows": f"{options.rows} of {options.data.name}, {options.batch_size} a step",
        "timed": f"collating, forward and backward pass, AdamW; medians of {options.rounds} rounds in turns, "
        "processor time of one thread",
    }
    return Report("tools/bench offline", facts, lines)


def _epoch(name: str, folder: Path, options: argparse.Namespace) -> Callable[[], None]:
    """Prepare a run, and give what takes a step on each of its batches."""
    teacher = {"model": TEACHER, "cache": str(folder / "cache"), "method": name}
    config = from_mapping(
        {
            "student": str(folder / "student"),
            "data": {"path": str(options.data), "limit": options.rows},
            "output": str(folder / name),
            "teachers": [] if name == "sft" else [teacher],
            "train": {"device": "cpu", "batch_size": options.batch_size},
        }
    )
    prepared = prepare(config, Rows(config.data.all_sources), lambda _: None)
    trainer = prepared.trainer(training_arguments(config, folder / name))
    parameters = [*trainer.model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, fused=True)

    def epoch() -> None:
        for inputs in _batches(trainer, options.batch_size):
            trainer.compute_loss(trainer.model, inputs).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def _batches(trainer: DistillTrainer, size: int) -> Iterator[Any]:
    rows: Any = trainer.train_dataset
    for first in range(0, len(rows), size):
        yield trainer.data_collator(rows[first : first + size])
