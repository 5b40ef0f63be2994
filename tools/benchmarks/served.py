"""Time the steps of a run whose teacher is behind a server, against those with a cached one."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import _steps
from benchmarks._report import Line, Report
from benchmarks._steps import Epoch, cached_pair
from benchmarks.distill import TEACHER
from cdm_toolkit.hub.tokenizers import load_tokenizer

SERVED = 1.05
"""A step with a served teacher over one with a cached teacher, at most, where it answers in `SHARE` of a step."""
SHARE = 0.8


def add_options(parser: argparse.ArgumentParser) -> None:
    _steps.add_options(parser, rows=16)


def run(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cache = cached_pair(folder, options)
        cached = Epoch({"cache": cache.output}, folder, options)
        cached()
        delay = SHARE * median(cached()[1:])
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        server = context.Process(target=_serve, args=(theirs, cache.k, delay), daemon=True)
        server.start()
        try:
            served = Epoch({"url": ours.recv(), "top_k": cache.k}, folder, options)
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
