"""Map real vocabularies, select among a real teacher's candidates, and weigh what is matched."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import thread_time

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from benchmarks._report import Line, Report, medians, once
from cdm_toolkit.artifacts.maps import load_or_build_neighbours, load_table, save_table
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_view
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.contextual import PairTable, matched_mass, select_pairs
from cdm_toolkit.vocab_map.contextual_reference import make_pairing_rule, select_reference
from cdm_toolkit.vocab_map.exact import build_exact
from cdm_toolkit.vocab_map.keys import token_keys
from cdm_toolkit.vocab_map.min_ed import build_min_ed
from cdm_toolkit.vocab_map.neighbours import DEFAULT_MAX_EDIT_DISTANCE, build_neighbours, without_partner
from cdm_toolkit.vocab_map.partners import partner_rows
from cdm_toolkit.vocab_map.prefix import build_prefix
from cdm_toolkit.vocab_map.stats import matchable_by_strategy

SAMPLE = Path(__file__).resolve().parents[2] / "cdm_toolkit" / "samples" / "word_problems_train.jsonl"
POSITIONS, TOP_K, TWIN_POSITIONS = 512, 100, 32
BRUTE_CHUNK = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--t1", default="llama3", help="a tokenizer: alias, path or hub id (%(default)s)")
    parser.add_argument("--t2", default="qwen2", help="another (%(default)s)")
    parser.add_argument(
        "--teacher", default="smollm2", help="the model whose candidates are matched (%(default)s)"
    )
    parser.add_argument(
        "--students", nargs="+", default=["mistral", "qwen2"], help="tokenizers to match with (mistral qwen2)"
    )
    parser.add_argument(
        "--data", type=Path, default=SAMPLE, help="JSONL with question and answer (the sample)"
    )
    parser.add_argument("--rows", type=int, default=50, help="how many rows of it are read (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that build tables")
    parser.add_argument("--rounds", type=int, default=21, help="how often each call is timed (%(default)s)")


def run(options: argparse.Namespace) -> Report:
    view_t, view_s = load_view(options.t1), load_view(options.t2)
    lines = _tables(view_t, view_s, options.workers, options.rounds)
    rows = [
        json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()[: options.rows]
    ]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    for student in options.students:
        lines += _in_context(options, load_view(options.teacher), load_view(student), texts)
    facts = {
        "tables": f"{options.t1} and {options.t2}, {options.workers} threads",
        "candidates": f"top {TOP_K} of {options.teacher} on {len(texts)} rows of {options.data.name}; "
        "for the student's, that probability moved along the prefix map",
    }
    return Report("tools/bench vocab-map", facts, lines)


def _tables(view_t: TokenizerView, view_s: TokenizerView, workers: int, rounds: int) -> list[Line]:
    pair = f"{view_t.name} → {view_s.name}"
    # Compile first: numba keeps what it compiled on disk.
    small = load_view("mistral")
    build_neighbours(small, small, workers=workers)
    build_min_ed(small, small, workers=workers)
    near = once(partial(build_neighbours, view_t, view_s, workers=workers, match_digits=False)) / 1e3
    brute = once(partial(_brute_force, view_t, view_s, workers)) / 1e3
    min_ed = once(partial(build_min_ed, view_t, view_s, workers=workers)) / 1e3
    table = build_neighbours(view_t, view_s, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        save_table(path, table)
        reload = medians({"reload": partial(load_table, path, view_t, view_s)}, rounds)["reload"]
    return [
        Line(f"shared ids, {pair}", float(build_exact(view_t, view_s).matched.sum()), "ids"),
        Line(f"neighbour table, both directions, {pair}", near, "s", at_most=30),
        Line("the same by rapidfuzz's cdist on all pairs", brute, "s"),
        Line("neighbour table, faster than that", brute / near, "×"),
        Line(f"MinED of the whole vocabulary, {pair}", min_ed, "s", at_most=30),
        Line("neighbour table, read from disk", reload / 1e3, "s", at_most=0.3),
    ]


def _brute_force(view_t: TokenizerView, view_s: TokenizerView, workers: int) -> int:
    """Count the near pairs of whole-character tokens by trying all, and so without half characters."""
    keys_t, keys_s = token_keys(view_t, strip=True), token_keys(view_s, strip=True)
    count = 0
    for queries, choices in (
        (without_partner(keys_t, view_t, view_s), keys_s),
        (without_partner(keys_s, view_s, view_t), keys_t),
    ):
        texts_q, texts_c = ([key.text for key in keys if key.text is not None] for keys in (queries, choices))
        lengths = np.array([len(text) for text in texts_c])
        for start in range(0, len(texts_q), BRUTE_CHUNK):
            part = texts_q[start : start + BRUTE_CHUNK]
            edits = cdist(part, texts_c, scorer=Levenshtein.distance, workers=workers, dtype=np.uint8)
            limits = DEFAULT_MAX_EDIT_DISTANCE * (np.array([[len(text)] for text in part]) + lengths)
            count += int((edits < limits).sum())
    return count


@dataclass(frozen=True, slots=True)
class Candidates:
    """Hold both sides' top k at each position, and the teacher's probability by strategy."""

    teacher: tuple[torch.Tensor, torch.Tensor]
    student: tuple[torch.Tensor, torch.Tensor]
    mass: Mapping[str, float]


def _in_context(
    options: argparse.Namespace, view_t: TokenizerView, view_s: TokenizerView, texts: Sequence[str]
) -> list[Line]:
    pair = f"{view_t.name} → {view_s.name}"
    exact = build_exact(view_t, view_s)
    near = load_or_build_neighbours(
        view_t, view_s, max_edit_distance=DEFAULT_MAX_EDIT_DISTANCE, workers=options.workers
    )
    min_ed, prefix = build_min_ed(view_t, view_s, workers=options.workers), build_prefix(view_t, view_s)
    reachable = matchable_by_strategy(exact, min_ed, prefix, near)
    found = _candidates(options.teacher, view_t, texts, prefix.dense(), view_s.vocab_size, reachable)
    table = PairTable.from_tables(exact, near)
    everything = select_pairs(table, *found.teacher, *found.student)
    at = torch.arange(POSITIONS) % len(found.teacher[0])
    inputs = [column[at] for column in (*found.teacher, *found.student)]
    fast = medians({"select": partial(select_pairs, table, *inputs)}, options.rounds, thread_time)["select"]
    rule = make_pairing_rule(
        view_t,
        view_s,
        partner_rows(exact, near)[0],
        max_edit_distance=near.max_edit_distance,
        match_digits=near.match_digits,
    )
    some = [column[:TWIN_POSITIONS] for column in inputs]
    by_twin: list[dict[int, int]] = []
    twin = once(lambda: by_twin.extend(_twin(rule, some)), thread_time) * POSITIONS / TWIN_POSITIONS
    by_table = select_pairs(table, *some).student_slots
    same = sum(
        {slot: other for slot, other in enumerate(row) if other >= 0} == pairs
        for row, pairs in zip(by_table.tolist(), by_twin, strict=True)
    )
    return [
        Line(f"select, {POSITIONS} positions × {TOP_K}, one core, {pair}", fast, at_most=40),
        Line(f"its plain Python twin, from {TWIN_POSITIONS} positions", twin),
        Line("select, faster than its twin", twin / fast, "×", at_least=100),
        Line("positions where both agree", 100 * same / TWIN_POSITIONS, "%", at_least=100),
        *(
            Line(
                f"teacher's probability matched, {name}, {pair}", mass, "", at_least=_least(name, found.mass)
            )
            for name, mass in found.mass.items()
        ),
        Line(
            f"teacher's probability paired in context, {pair}",
            float(matched_mass(everything.mask, found.teacher[1]).mean()),
            "",
        ),
        Line("of it on exact pairs", float(matched_mass(everything.exact, found.teacher[1]).mean()), ""),
    ]


def _least(strategy: str, mass: Mapping[str, float]) -> float | None:
    return {"+prefix": 0.99, "+contextual": mass["exact"]}.get(strategy)


def _twin(rule: object, inputs: Sequence[torch.Tensor]) -> list[dict[int, int]]:
    teacher_ids, teacher_logprob, student_ids, student_logprob = (column.tolist() for column in inputs)
    return [
        select_reference(rule, list(zip(*teacher, strict=True)), list(zip(*student, strict=True)))
        for teacher, student in zip(
            zip(teacher_ids, teacher_logprob, strict=True),
            zip(student_ids, student_logprob, strict=True),
            strict=True,
        )
    ]


@torch.no_grad()
def _candidates(
    teacher: str,
    view_t: TokenizerView,
    texts: Sequence[str],
    prefix: np.ndarray,
    size_s: int,
    reachable: Mapping[str, np.ndarray],
) -> Candidates:
    """Run the teacher over texts, one at a time so that no logits pile up."""
    model = load_model(teacher)
    to_student = torch.from_numpy(np.where(prefix >= 0, prefix, size_s))
    sides: tuple[list[torch.Tensor], ...] = ([], [], [], [])
    mass: dict[str, list[np.ndarray]] = {name: [] for name in reachable}
    for text in texts:
        ids = torch.from_numpy(view_t.encode(text).ids.astype(np.int64))
        logprob = model(ids[None]).logits[0].float()[:, : view_t.vocab_size].log_softmax(-1)
        for name, mask in reachable.items():
            mass[name].append(logprob.exp().numpy()[:, mask].sum(1))
        moved = torch.zeros(len(ids), size_s + 1).index_add_(1, to_student, logprob.exp())
        for ids_out, values_out, values in zip(
            sides[::2], sides[1::2], (logprob, moved[:, :size_s].log()), strict=True
        ):
            best = values.topk(TOP_K)
            ids_out.append(best.indices)
            values_out.append(best.values)
    ids_t, logprob_t, ids_s, logprob_s = (torch.cat(parts) for parts in sides)
    means = {name: float(np.concatenate(parts).mean()) for name, parts in mass.items()}
    return Candidates((ids_t, logprob_t), (ids_s, logprob_s), means)
