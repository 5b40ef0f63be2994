"""Time a student's steps on packed batches against padded ones, and count what is padding."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import thread_time

import numpy as np
import torch
from torch import nn

from benchmarks._report import Line, Report, medians
from cdm_toolkit.distill.sampler import TokenBatchSampler, epoch_order
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.students import new_student
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.aligned_rows import AlignedRow, truncate_aligned
from cdm_toolkit.kd.batch import AlignedBatch, Collator
from cdm_toolkit.kd.loss_sums import loss_sums
from cdm_toolkit.kd.tokenized_rows import tokenize_rows, tokenizer_side

SAMPLE = Path(__file__).resolve().parents[2] / "cdm_toolkit" / "samples" / "word_problems_train.jsonl"
FASTER = 1.3
"""Packed over padded rows in the order of the seed, at least."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, default=SAMPLE, help="JSONL with question and answer (the sample)"
    )
    parser.add_argument("--student", help="a model in place of a fresh one with Mistral's tokenizer")
    parser.add_argument("--size", default="10m", help="parameters of the fresh student (%(default)s)")
    parser.add_argument("--rows", type=int, default=64, help="how many are read (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a padded batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often all rows are timed (%(default)s)")


def run(options: argparse.Namespace) -> Report:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        name = options.student or str(Path(folder) / "student")
        if not options.student:
            new_student("mistral", options.size, Path(name))
        model, loaded = load_model(name).train(), load_tokenizer(name)
    side = tokenizer_side(loaded.tokenizer, loaded.view)
    rows = read_rows(options.data)[: options.rows]
    features = [
        truncate_aligned(row.number, one, [], 1024)[0]
        for row, one in zip(rows, tokenize_rows(side, rows, "none"), strict=True)
    ]
    batches = _layouts(features, options.batch_size)
    taken = medians(
        {layout: partial(_step, model, made) for layout, made in batches.items()}, options.rounds, thread_time
    )
    tokens = sum(len(row.student_ids) for row in features)
    lines = []
    for layout, made in batches.items():
        positions = sum(batch.student["input_ids"].numel() for batch in made)
        lines.append(Line(f"{layout}, padding", 100 * (1 - tokens / positions), "% of positions"))
        lines.append(Line(f"{layout}, speed", 1e3 * tokens / taken[layout], "tokens/s"))
    lines.append(Line("packed over padded", taken["padded"] / taken["packed"], "×", at_least=FASTER))
    by_length = taken["padded, by length"] / taken["packed"]
    lines.append(Line("packed over padded, by length", by_length, "×"))
    longest = max(len(row.student_ids) for row in features)
    facts = {
        "model": f"{options.student or f'a fresh one of {options.size} with the tokenizer of mistral'}, float32",
        "rows": f"{len(features)} of {options.data.name}, {tokens:,} tokens, the longest of {longest}",
        "batches": f"{options.batch_size} rows; packed ones as many tokens",
        "timed": f"forward and backward pass over all rows, medians of {options.rounds} rounds in turns, processor "
        "time of one thread",
    }
    return Report("tools/bench pack", facts, lines)


def _layouts(features: Sequence[AlignedRow], size: int) -> dict[str, list[AlignedBatch]]:
    lengths = np.array([len(row.student_ids) for row in features])

    def padded(by_length: bool) -> list[AlignedBatch]:
        order = epoch_order(lengths, rows_per_step=size, seed=0, epoch=0, group_by_length=by_length)
        parts = [order[at : at + size] for at in range(0, len(order), size)]
        return [Collator()([features[nth] for nth in part]) for part in parts]

    sampler = TokenBatchSampler(
        lengths,
        tokens=int(size * lengths.mean()),
        packed=True,
        batches_per_step=1,
        seed=0,
        epoch=lambda: 0,
    )
    packed = [Collator(packing="rows")([features[nth] for nth in part]) for part in sampler]
    return {"padded": padded(False), "padded, by length": padded(True), "packed": packed}


def _step(model: nn.Module, batches: Sequence[AlignedBatch]) -> None:
    for batch in batches:
        loss_sums(batch.student_logits_at(model), batch.labels).ce.backward()
    model.zero_grad()
