"""Make features of many rows: rows a second, peak memory, and a step that is killed and goes on."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._report import Line, Report

SAMPLE = Path(__file__).resolve().parents[2] / "cdm_toolkit" / "samples" / "word_problems_train.jsonl"
MEMORY = 1.5
"""How much more memory the most rows may take than the fewest."""
STEP = """
import json, resource, sys, time
from pathlib import Path
from cdm_toolkit.distill.dataset import build_dataset
from cdm_toolkit.distill.settings import SourceConfig
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.tokenized_rows import TeacherSide, tokenizer_side

data, workers = sys.argv[1], int(sys.argv[2])
sides = [tokenizer_side(each.tokenizer, each.view) for each in map(load_tokenizer, ("mistral", "smollm2"))]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = Rows((SourceConfig(path=data),))
began = time.perf_counter()
features, counts = build_dataset(rows, sides[0], [TeacherSide(sides[1])], workers=workers)
seconds = time.perf_counter() - began
numbers = features.numbers
print(json.dumps({
    "seconds": seconds, "before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    "trained": counts.trained, "read": counts.read, "once": bool((numbers[1:] > numbers[:-1]).all()),
}))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="(%(default)s)")
    parser.add_argument(
        "--short", action="store_true", help="rows of one sum, in place of the sample's word problems"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that align (%(default)s)")
    parser.add_argument(
        "--killed", type=int, default=20_000, help="rows of the step that is killed (%(default)s)"
    )


def run(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sample = None if options.short else SAMPLE
        found = {rows: _built(folder, sample, rows, options.workers) for rows in sorted(options.rows)}
        resumed = _killed(folder, sample, options.killed, options.workers)
    first, last = (found[rows] for rows in (min(found), max(found)))
    lines = [
        line
        for rows, made in found.items()
        for line in (
            Line(f"{rows:,} rows: rows a second", made["read"] / made["seconds"], unit=""),
            Line(f"{rows:,} rows: peak memory, MiB", made["peak"] / 1024, unit=""),
        )
    ]
    lines += [
        Line(
            "memory of the most rows over that of the fewest",
            last["peak"] / first["peak"],
            unit="×",
            at_most=MEMORY,
        ),
        Line("rows made twice or never after kill -9", resumed, unit="", at_most=0),
    ]
    kind = "sums" if options.short else "word problems of the sample with other numbers"
    facts = {"tokenizers": "smollm2 and mistral", "workers": options.workers, "rows": kind}
    return Report(
        "tools/bench data (JSONL; its reading is part of it)",
        facts,
        lines,
    )


def _written(path: Path, sample: Path | None, rows: int) -> Path:
    """Write a sample's rows over and over, with numbers of their own, or sums."""
    texts = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()] if sample else []
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for nth in range(rows):
            number = generator.randrange(10**6)
            row = texts[nth % len(texts)] if texts else {"question": f"What is {nth} + {number}?"}
            answer = f"{row['answer']} ({number})" if texts else f"It is {nth + number}."
            file.write(json.dumps({"prompt": row["question"], "completion": answer}) + "\n")
    return path


def _started(folder: Path, data: Path, workers: int) -> subprocess.Popen[str]:
    environment = os.environ | {
        "CDM_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", STEP, str(data), str(workers)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def _built(folder: Path, sample: Path | None, rows: int, workers: int) -> dict[str, Any]:
    process = _started(folder, _written(folder / f"{rows}.jsonl", sample, rows), workers)
    said, _ = process.communicate()
    made: dict[str, Any] = json.loads(said)
    return made


def _killed(folder: Path, sample: Path | None, rows: int, workers: int) -> int:
    """Kill a step when its second part is there, let another go on, and count the rows that are not there once."""
    data = _written(folder / "killed.jsonl", sample, rows)
    process = _started(folder, data, workers)
    features = folder / "cache" / "features"
    while process.poll() is None and not [*features.glob(".making-*/part-00001.arrow")]:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len([*features.glob(".making-*/part-*.arrow")])
    said, _ = _started(folder, data, workers).communicate()
    made = json.loads(said)
    if not kept:
        raise OSError("the step had ended before it was killed: give more rows with --killed")
    return rows - made["trained"] if made["once"] else rows
