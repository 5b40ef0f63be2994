"""Steps of a run, one by one, without the Trainer's loop: what benchmarks of a step have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.distill import SAMPLE, TEACHER
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.distill.trainer import asked_ahead
from cdm_toolkit.distill.training_arguments import training_arguments
from cdm_toolkit.distill.write_teacher_cache import CacheSettings, write_cache
from cdm_toolkit.hub.students import transplant
from cdm_toolkit.hub.tokenizers import load_tokenizer


def add_options(parser: argparse.ArgumentParser, *, rows: int) -> None:
    parser.add_argument(
        "--data", type=Path, default=SAMPLE, help="JSONL with question and answer (the sample)"
    )
    parser.add_argument("--rows", type=int, default=rows, help="how many are trained on (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the rows are timed (%(default)s)")


def cached_pair(folder: Path, options: argparse.Namespace) -> CacheSettings:
    """Make the student, the teacher's body with Mistral's tokenizer, and the teacher's cache; gives its settings."""
    torch.set_num_threads(1)
    transplant(TEACHER, load_tokenizer("mistral"), folder / "student")
    cache = CacheSettings(
        model=TEACHER,
        data=str(options.data),
        output=str(folder / "cache"),
        limit=options.rows,
        device="cpu",
    )
    write_cache(cache)
    return cache


class Epoch:
    """A run whose call takes a step on each of its batches, and gives the seconds of each."""

    def __init__(self, teacher: dict[str, Any] | None, folder: Path, options: argparse.Namespace) -> None:
        config = from_mapping(
            {
                "student": str(folder / "student"),
                "data": {"path": str(options.data), "limit": options.rows},
                "output": str(folder / "out"),
                "teachers": [] if teacher is None else [{"model": TEACHER} | teacher],
                "train": {"device": "cpu", "batch_size": options.batch_size},
            }
        )
        self.prepared = prepare(config, Rows(config.data.all_sources), lambda _: None, keep_answers=False)
        self.trainer = self.prepared.trainer(training_arguments(config, folder / "out"))
        self.size = options.batch_size
        self.optimizer = torch.optim.AdamW(self.trainer.model.parameters(), lr=2e-5, fused=True)

    def __call__(self) -> list[float]:
        trainer, seconds, began = self.trainer, list[float](), perf_counter()
        for inputs in asked_ahead(self._batches(), [each.teacher for each in self.prepared.objectives]):
            trainer.compute_loss(trainer.model, inputs).backward()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds.append(perf_counter() - began)
            began = perf_counter()
        return seconds

    def _batches(self) -> Iterator[Any]:
        rows: Any = self.trainer.train_dataset
        for first in range(0, len(rows), self.size):
            yield self.trainer.data_collator(rows[first : first + self.size])
