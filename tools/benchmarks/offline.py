"""Time the steps of a run whose teacher is a cache, against those of SFT on the same rows."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import thread_time

from benchmarks import _steps
from benchmarks._report import Line, Report, medians
from benchmarks._steps import Epoch, cached_pair
from benchmarks.distill import TEACHER

OFFLINE = 1.05
"""A step with a cached teacher over one of SFT, at most."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=["spelling"], help="(%(default)s)")
    _steps.add_options(parser, rows=8)


def run(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cache = cached_pair(folder, options)
        epochs = {"sft": Epoch(None, folder, options)}
        for name in options.methods:
            epochs[name] = Epoch({"cache": cache.output, "method": name}, folder, options)
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
