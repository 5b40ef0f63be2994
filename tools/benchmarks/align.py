"""Align two real tokenizers' spans: 2,048 tokens, up to a million, and the paper's DTW."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import thread_time

import numpy as np

from benchmarks._report import Line, Report, medians, once
from cdm_toolkit.alignment import anchored_reference, dtw_reference
from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.alignment.sides import AlignmentSide, token_string
from cdm_toolkit.hub.tokenizers import load_view
from cdm_toolkit.tokdiff.spans import TokenSpans
from cdm_toolkit.tokdiff.view import TokenizerView

SAMPLE = Path(__file__).resolve().parents[2] / "cdm_toolkit" / "samples" / "word_problems_train.jsonl"
LENGTH = 2048
LENGTHS = (1_000, 10_000, 100_000, 1_000_000)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--t1", default="llama3", help="a tokenizer: alias, path or hub id (%(default)s)")
    parser.add_argument("--t2", default="qwen2", help="another (%(default)s)")
    parser.add_argument(
        "--data", type=Path, default=SAMPLE, help="JSONL with question and answer (the sample)"
    )
    parser.add_argument("--rounds", type=int, default=21, help="how often each call is timed (%(default)s)")


def run(options: argparse.Namespace) -> Report:
    view_t, view_s = load_view(options.t1), load_view(options.t2)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    text = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    short = _of_length(view_t, text, LENGTH)
    lines = [
        *_anchored(view_t, view_s, short, options.rounds),
        *_growth(view_t, view_s, text, options.rounds),
        *_entropy_dtw(view_t, view_s, text, options.rounds),
    ]
    facts = {
        "tokenizers": f"{options.t1} and {options.t2}",
        "text": options.data.name,
        "rounds": options.rounds,
    }
    return Report("tools/bench align (spans given; processor time of one thread, medians)", facts, lines)


def _anchored(view_t: TokenizerView, view_s: TokenizerView, text: str, rounds: int) -> list[Line]:
    t, s = view_t.encode(text), view_s.encode(text)
    ones_t, ones_s = [3] * len(t), [3] * len(s)
    found = medians(
        {
            "anchored": partial(align, t, s),
            "bytes": partial(align, t, s, aligner="bytes"),
            "encode": lambda: (view_t.backend.encode(text), view_s.backend.encode(text)),
        },
        rounds,
        thread_time,
    )
    twin = once(
        lambda: anchored_reference.anchored(AlignmentSide.of(t), AlignmentSide.of(s), ones_t, ones_s),
        thread_time,
    )
    size = f"{len(t):,} × {len(s):,} tokens"
    return [
        Line(f"anchored, {size}", found["anchored"], at_most=2),
        Line("bytes", found["bytes"]),
        Line("anchored's plain Python twin, once", twin),
        Line("the two tokenizers encode the text", found["encode"]),
        Line("anchored, of the time to encode", 100 * found["anchored"] / found["encode"], "%", at_most=10),
        Line("anchored, faster than its twin", twin / found["anchored"], "×"),
    ]


def _growth(view_t: TokenizerView, view_s: TokenizerView, text: str, rounds: int) -> list[Line]:
    lines = []
    for length in LENGTHS:
        longer = _of_length(view_t, text, length)
        t, s = view_t.encode(longer), view_s.encode(longer)
        times = max(3, rounds // (1 + length // 20_000))
        taken = medians({"anchored": partial(align, t, s)}, times, thread_time)["anchored"]
        lines.append(Line(f"anchored a token, {len(t):,} tokens", 1e6 * taken / len(t), "ns"))
    per_token = [line.value for line in lines]
    growth = per_token[-1] / per_token[1]
    return [*lines, Line("time a token, 1,000,000 against 10,000 tokens", growth, "×", at_most=1.5)]


def _entropy_dtw(view_t: TokenizerView, view_s: TokenizerView, text: str, rounds: int) -> list[Line]:
    longer = _of_length(view_t, text, 2 * LENGTH)
    t, s = (_first(view.encode(longer), LENGTH) for view in (view_t, view_s))
    random = np.random.default_rng(0)
    entropy_t, entropy_s = random.gamma(1.0, 1.0, LENGTH), random.gamma(1.0, 1.0, LENGTH)
    call = partial(align, t, s, aligner="entropy-dtw", entropy_t=entropy_t, entropy_s=entropy_s)
    fast = medians({"fast": call}, rounds, thread_time)["fast"]
    tokens_t = [token_string(t.view, i) for i in t.ids.tolist()]
    tokens_s = [token_string(s.view, i) for i in s.ids.tolist()]
    weights = [dtw_reference.entropy_weights(entropy.tolist()) for entropy in (entropy_t, entropy_s)]
    twin = once(lambda: dtw_reference.warp(tokens_t, tokens_s, *weights), thread_time)
    return [
        Line(f"entropy-dtw, {LENGTH:,} × {LENGTH:,} tokens with their distances", fast, at_most=60),
        Line(f"distinct tokens: {len(set(tokens_t)):,} × {len(set(tokens_s)):,}; memory for the path",
             LENGTH * LENGTH / 4 / 2**20, "MiB"),
        Line("entropy-dtw's plain Python twin, once", twin),
        Line("entropy-dtw, faster than its twin", twin / fast, "×"),
    ]  # fmt: skip


def _of_length(view: TokenizerView, text: str, tokens: int) -> str:
    """Repeat a text, and cut it so that it has about this many tokens."""
    size = len(text.encode()) / len(view.encode(text))
    text *= 1 + int(tokens * size / len(text.encode()) * 1.2)
    end = view.encode(text).end[tokens - 1]
    return text.encode()[:end].decode(errors="ignore")


def _first(spans: TokenSpans, count: int) -> TokenSpans:
    names = ("ids", "start", "end", "special", "exact")
    return replace(spans, **{name: getattr(spans, name)[:count] for name in names})
