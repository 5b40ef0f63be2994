"""Load a model as it is stored, cast, quantised, and to a GPU that is not here: what that takes at its peak."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._report import Grid, Line, Report
from benchmarks.trace import device_library

HERE = Path(__file__).resolve().parent
MIB = 2**20
BESIDE = 48
"""MiB beside the weights and what is read at once: modules, tables, the interpreter's."""
KINDS: Mapping[str, Mapping[str, str]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "8bit": {"quantization": "8bit"},
    "4bit": {"quantization": "4bit"},
    "float32, to a GPU": {"device": "cuda:1"},
    "bfloat16, to a GPU": {"device": "cuda:1", "dtype": "bfloat16"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="name of the model (%(default)s)")


def run(options: argparse.Namespace) -> Report:
    lines, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        library = device_library(Path(folder))
        loaded = load(options.model, library, list(KINDS.values()))
        for kind, sizes in zip(KINDS, loaded, strict=True):
            found = {name: size / MIB for name, size in sizes.items()}
            figures = (found[name] for name in ("weights", "on_device", "peak_allocated", "peak"))
            rows.append((kind, *(f"{figure:,.0f}" for figure in figures)))
            own = 0 if found["on_device"] else found["weights"]
            at_most = own + found["largest"] + BESIDE
            lines.append(Line(f"{kind}: allocated in host memory", found["peak_allocated"], "MiB", at_most))
            if found["on_device"]:
                lines.append(Line(f"{kind}: on the GPU", found["on_device"], "MiB", found["weights"]))
    columns = ("MiB", "weights", "on the GPU", "allocated", "with pages of the file")
    facts = {
        "model": options.model,
        "counted": "the process's peak above what it had with torch and transformers; freed memory goes back at once",
        "GPU": "FakeTensorMode in place of one",
    }
    title = "tools/bench load"
    return Report(title, facts, lines, [Grid("At the peak of loading", columns, rows)])


def load(model: str, library: Path | None, several: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """Load a model with each of several options, in a process of its own each.

    Gives a `_loaded.Loaded` for each as plain values. OSError where one fails.
    """
    path = os.pathsep.join((str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")))
    given = json.dumps([{"name": model, **options} for options in several])
    done = subprocess.run(
        [sys.executable, str(HERE / "_loaded.py"), given, str(library or "")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    if done.returncode:
        raise OSError(f"{given} cannot be loaded:\n{done.stderr}")
    found: list[dict[str, int]] = json.loads(done.stdout)
    return found
