"""Time what a student samples in an on-policy run, against a bare `generate` of the same prompts."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import torch

from benchmarks import _steps
from benchmarks._report import Line, Report
from benchmarks.distill import TEACHER
from cdm_toolkit.batching import padded
from cdm_toolkit.distill.generate import ends_of, seed_of
from cdm_toolkit.distill.on_policy import OnPolicy
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.errors import CdmError
from cdm_toolkit.hub.students import transplant
from cdm_toolkit.hub.tokenizers import load_tokenizer

AT_LEAST = 0.95
"""Tokens a second over those of `generate`."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--new-tokens", type=int, default=48, help="of a sample, at most (%(default)s)")
    _steps.add_options(parser, rows=8)


def run(options: argparse.Namespace) -> Report:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        transplant(TEACHER, load_tokenizer("mistral"), folder / "student")
        config = from_mapping(
            {
                "student": str(folder / "student"),
                "data": {"path": str(options.data), "limit": options.rows},
                "output": str(folder / "out"),
                "teachers": [{"model": TEACHER, "method": "exact"}],
                "on_policy": {"share": 1, "max_new_tokens": options.new_tokens},
                "train": {"device": "cpu"},
            }
        )
        prepared = prepare(config, Rows(config.sources), lambda _: None)
    on_policy, student = prepared.on_policy, prepared.student.eval()
    assert on_policy is not None
    # in the order that a run takes, so that both draw the same
    numbers = sorted(on_policy.prompts, key=lambda number: -len(on_policy.prompts[number].ids))
    speeds: dict[str, list[float]] = {"bare": [], "a run's": []}
    _of_run(student, on_policy, numbers)  # what is made once is made
    for _ in range(options.rounds):
        bare, speed = _bare(student, on_policy, numbers)
        speeds["bare"].append(speed)
        drawn, speed = _of_run(student, on_policy, numbers)
        speeds["a run's"].append(speed)
        if drawn != bare:
            raise CdmError("a run does not sample what `generate` does", got=f"{drawn} and {bare}")
    ratios = [ours / bare for ours, bare in zip(speeds["a run's"], speeds["bare"], strict=True)]
    lines = [
        Line("bare generate", median(speeds["bare"]), "tokens/s"),
        Line("sampling of a run, aligned with the teacher's tokens", median(speeds["a run's"]), "tokens/s"),
        Line("the same, of bare generate", median(ratios), "×", at_least=AT_LEAST),
    ]
    facts = {
        "models": f"{TEACHER}'s body with Mistral's tokenizer samples, {TEACHER} is the teacher; float32",
        "rows": f"{len(numbers)} prompts of {options.data.name} at once, at most {options.new_tokens} tokens each",
        "timed": f"medians of {options.rounds} rounds in turns, processor time of one thread",
    }
    return Report("tools/bench sampling", facts, lines)


def _bare(student: Any, on_policy: OnPolicy, numbers: list[int]) -> tuple[list[list[int]], float]:
    """Sample by the shortest program that does: gives the ids, and tokens a second."""
    ends = ends_of(on_policy.student, student)
    began = thread_time()
    torch.manual_seed(seed_of(0, 0, 0))
    ids, mask, _ = padded([on_policy.prompts[number].ids for number in numbers], ends[0], "left")
    with torch.no_grad():
        out = student.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=on_policy.settings.max_new_tokens,
            do_sample=True,
            top_k=0,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    rows = [_up_to_the_end(row, ends) for row in out[:, ids.shape[1] :].tolist()]
    taken = thread_time() - began
    return rows, sum(map(len, rows)) / taken


def _up_to_the_end(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]


def _of_run(student: Any, on_policy: OnPolicy, numbers: list[int]) -> tuple[list[list[int]], float]:
    began = thread_time()
    (drawn,) = on_policy.draw(student, [numbers], 0, 0, 1)
    on_policy.samples([drawn])
    taken = thread_time() - began
    rows = [list(ids) for _, ids in drawn.samples]
    return rows, sum(map(len, rows)) / taken
