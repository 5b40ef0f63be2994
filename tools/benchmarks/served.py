"""Time the steps of a run whose teacher is behind a server, against those with a cached one."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks._report import Line, Report
from benchmarks.distill import SAMPLE, TEACHER
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.distill.trainer import DistillTrainer, asked_ahead, training_arguments
from cdm_toolkit.distill.write_teacher_cache import CacheSettings, write_cache
from cdm_toolkit.hub.students import transplant
from cdm_toolkit.hub.tokenizers import load_tokenizer

SERVED = 1.05
"""A step with a served teacher over one with a cached teacher, at most, where it answers in `SHARE` of a step."""
SHARE = 0.8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, default=SAMPLE, help="JSONL with question and answer (the sample)"
    )
    parser.add_argument("--rows", type=int, default=16, help="how many are trained on (%(default)s)")
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
        cached = _epoch({"cache": str(folder / "cache")}, folder, options)
        cached()
        delay = SHARE * median(cached()[1:])
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        server = context.Process(target=_serve, args=(theirs, cache.k, delay), daemon=True)
        server.start()
        try:
            served = _epoch({"url": ours.recv()}, folder, options)
            taken: dict[str, list[list[float]]] = {"cached": [], "served": []}
            for _ in range(options.rounds):
                taken["cached"].append(cached())
                taken["served"].append(served())
        finally:
            server.terminate()
    step = {name: median(each for epoch in epochs for each in epoch[1:]) for name, epochs in taken.items()}
    lines = [
        Line("a step with a cached teacher", 1e3 * step["cached"]),
        Line("an answer of the server", 1e3 * delay),
        Line(
            "the first step, for which nothing is asked ahead",
            1e3 * median(each[0] for each in taken["served"]),
        ),
        Line("served over cached, all other steps", step["served"] / step["cached"], "×", SERVED),
    ]
    facts = {
        "models": f"k = {cache.k}; the student is the body of {TEACHER} with Mistral's tokenizer; float32",
        "server": f"a stand-in in a process of its own; each answer takes {SHARE} of a step, and costs no model",
        "rows": f"{options.rows} of {options.data.name}, {options.batch_size} a step",
        "timed": "collating, waiting, forward and backward pass, AdamW; medians of the steps of "
        f"{options.rounds} rounds in turns",
    }
    return Report("tools/bench served", facts, lines)


def _epoch(teacher: dict[str, Any], folder: Path, options: argparse.Namespace) -> Callable[[], list[float]]:
    """Prepare a run, and give what takes a step on each of its batches, and tells the seconds of each."""
    config = from_mapping(
        {
            "student": str(folder / "student"),
            "data": {"path": str(options.data), "limit": options.rows},
            "output": str(folder / "out"),
            "teachers": [{"model": TEACHER, "top_k": 100} | teacher],
            "train": {"device": "cpu", "batch_size": options.batch_size},
        }
    )
    prepared = prepare(config, Rows(config.data.all_sources), lambda _: None, keep_answers=False)
    trainer = prepared.trainer(training_arguments(config, folder / "out"))
    parameters = [*trainer.model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, fused=True)

    def epoch() -> list[float]:
        seconds, began = [], perf_counter()
        for inputs in asked_ahead(_batches(trainer, options.batch_size), [prepared.objectives[0].teacher]):
            trainer.compute_loss(trainer.model, inputs).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(perf_counter() - began)
            began = perf_counter()
        return seconds

    return epoch


def _batches(trainer: DistillTrainer, size: int) -> Iterator[Any]:
    rows: Any = trainer.train_dataset
    for first in range(0, len(rows), size):
        yield trainer.data_collator(rows[first : first + size])


# The stand-in: what stands at a position, and the same k candidates everywhere


def _serve(pipe: Any, k: int, delay: float) -> None:
    tokenizer = load_tokenizer(TEACHER).tokenizer

    def entry(token: int, logprob: float) -> str:
        text = json.dumps(tokenizer.decode([token]))
        return f'"{token}":{{"logprob":{logprob},"rank":1,"decoded_token":{text}}}'

    best = {token: entry(token, -1.0 - nth / 10) for nth, token in enumerate(range(1000, 1000 + k))}
    others = ",".join(best.values())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            wanted = asked["prompt_logprobs"]
            few = others if wanted == k else ",".join([*best.values()][:wanted])
            places = [
                f"{{{few}}}" if token in best and wanted == k else f"{{{entry(token, -2.0)},{few}}}"
                for token in asked["prompt"][1:]
            ]
            body = f'{{"choices":[{{"prompt_logprobs":[null,{",".join(places)}]}}]}}'.encode()
            time.sleep(delay)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(f"http://127.0.0.1:{server.server_address[1]}")
    server.serve_forever()
