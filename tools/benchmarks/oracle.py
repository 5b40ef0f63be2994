"""Measure how far each method's target is from the teacher's true distribution of the student's next token."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._report import Grid, Line, Report
from cdm_toolkit import kd
from cdm_toolkit.compare.corpora import text_rows
from cdm_toolkit.hub.cut_vocabulary import load_cut
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.continuations import ReadText
from cdm_toolkit.kd.loss_sums import LossInputs, loss_sums
from cdm_toolkit.kd.next_token_oracle import NextToken, NextTokenOracle, OracleQuery
from cdm_toolkit.kd.sparse_logprobs import top_k

KINDS = ("1-1", "1-n", "n-1", "n-m", "inside 1-n", "inside n-m")
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "spelling": ("spelling", {}),
    "spelling, not joint": ("spelling", {"joint": False}),
    "spelling, one direction": ("spelling", {"both_directions": False}),
    "exact": ("exact", {}),
    "min-ed": ("min-ed", {}),
    "prefix": ("prefix", {}),
    "cdm": ("cdm", {}),
    "x-token": ("x-token", {}),
    "byte-marginal": ("byte-marginal", {}),
}
SMOOTH = 1e-3
"""Probability of the oracle that all ids share: so much a student has left for what no continuation leads to."""
FAR = 0.1
"""Nats from which on a target is far from the oracle."""
LEAST = 1e-6
"""The least probability of a target's rest."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", default="smollm2", help="a model: alias, path or hub id (%(default)s)")
    parser.add_argument("--student", default="gpt2", help="a tokenizer (%(default)s)")
    parser.add_argument("--entries", type=int, help="ids that the student's vocabulary is cut to (all)")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument(
        "--rows", type=int, default=20, help="rows of it, and docstrings, to read (%(default)s)"
    )
    parser.add_argument("--positions", type=int, default=200, help="how many are measured (%(default)s)")
    parser.add_argument("--most", type=int, default=200, help="continuations to follow at each (%(default)s)")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="take from this .npz, and add, what the oracle said"
    )
    parser.add_argument("--worst", type=int, default=12, help="positions to show, the worst of spelling")
    parser.add_argument("--seed", type=int, default=0)


@dataclass(frozen=True, slots=True)
class Place:
    """A student's position in a row, by the row of the labels' logits that predict it."""

    row: int
    label: int
    first: int
    """The label that its group begins with."""
    group: int
    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """One row of data, aligned."""

    batch: kd.AlignedBatch
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Distance:
    """How far one target is from the oracle at a place, in nats.

    All but the loss are None where the method compares no student tokens, and `kl` is where it has none there.
    """

    kl: float | None
    """KL(oracle ‖ target) over the outcomes and the rest."""
    missed: float | None
    """The oracle's probability of the rest."""
    left_out: float | None
    """Entropy of the oracle within the outcomes and the rest: nothing is taught about it."""
    loss: float
    """The method's own divergence for a student that predicts what the oracle does."""


def run(options: argparse.Namespace) -> Report:
    teacher, student = load_tokenizer(options.teacher), load_cut(options.student, options.entries)
    pair = kd.TokenizerPair.from_loaded(teacher, student)
    model = load_model(options.teacher)
    methods = {name: kd.find_method(method)(pair, **settings) for name, (method, settings) in METHODS.items()}
    oracle = NextTokenOracle(pair, unsettled=0.004, most=options.most)
    texts = [_text(nth, pair.collate([row])) for nth, row in enumerate(_rows(options.data, options.rows))]
    every = [place for text in texts for place in text.places]
    chosen = _chosen(every, options.positions, np.random.default_rng(options.seed))
    kept = dict(np.load(options.keep)) if options.keep and options.keep.exists() else {}
    found: dict[Place, NextToken] = {}
    distances: dict[str, dict[Place, Distance]] = defaultdict(dict)
    shown: list[tuple[float, tuple[str, ...]]] = []
    for nth, text in enumerate(texts):
        here = {place.label: place for place in chosen if place.row == nth}
        if not here:
            continue
        read = ReadText(model, text.batch.teacher["input_ids"][0].tolist(), vocab=pair.vocab_t)
        asked = {label: _ask(oracle, read, text.batch, place, kept) for label, place in here.items()}
        if options.keep:
            np.savez(options.keep, **kept)
        known = {label: next_token for label, next_token in asked.items() if next_token is not None}
        found.update((here[label], next_token) for label, next_token in known.items())
        logits = _ideal_logits(text.batch, known, pair.vocab_s)
        signal = _signal(read, text.batch, methods["spelling"].top_k)
        for name, method in methods.items():
            measured = _distances(method, logits, signal, text.batch)
            distances[name].update((here[label], measured[label]) for label in known if label in measured)
        shown += _shown(pair, methods["spelling"], logits, signal, text.batch, known)
    shares = {kind: sum(place.kind == kind for place in every) / len(every) for kind in KINDS}
    return Report(
        "tools/bench oracle",
        _facts(options, pair, texts, shares),
        _lines(chosen, found),
        [_distances_grid(distances, shares), _worst(shown, options.worst)],
    )


def _rows(data: Path, rows: int) -> Iterator[Any]:
    with data.open(encoding="utf-8") as file:
        yield from map(json.loads, islice(file, rows))
    for row in text_rows("python:docstrings", rows=rows, split="heldout"):
        yield {"text": row.completion}


def _text(nth: int, batch: kd.AlignedBatch) -> Text:
    (side,) = batch.teachers
    size_t = torch.bincount(side.token_group, minlength=side.groups).tolist()
    size_s = torch.bincount(side.student_token_group, minlength=side.groups).tolist()
    places = []
    for label, group in zip(side.student_token_rows.tolist(), side.student_token_group.tolist(), strict=True):
        first = int(side.student_rows[group])
        kind = "-".join(
            "1" if size == 1 else letter for size, letter in ((size_t[group], "n"), (size_s[group], "m"))
        )
        kind = kind.replace("1-m", "1-n")
        places.append(Place(nth, label, first, group, kind if label == first else f"inside {kind}"))
    return Text(batch, tuple(places))


def _chosen(every: Sequence[Place], size: int, rng: np.random.Generator) -> list[Place]:
    """Draw about as many of each kind; where there are too few of one, more of the others."""
    left = {kind: [place for place in every if place.kind == kind] for kind in KINDS}
    chosen: list[Place] = []
    for nth, kind in enumerate(sorted(KINDS, key=lambda kind: len(left[kind]))):
        share = min((size - len(chosen)) // (len(KINDS) - nth), len(left[kind]))
        chosen += [left[kind][i] for i in rng.permutation(len(left[kind]))[:share]]
    return sorted(chosen, key=lambda place: (place.row, place.label))


def _ask(
    oracle: NextTokenOracle, read: ReadText, batch: kd.AlignedBatch, place: Place, kept: dict[str, np.ndarray]
) -> NextToken | None:
    """Ask the oracle about one place of a batch of one row, unless the answer was kept."""
    ids, first, position, before = OracleQuery.of(batch, place.label, place.group)
    asked = (oracle.pair.fingerprint, oracle.most, oracle.unsettled, oracle.least, ids, first, position)
    key = hashlib.sha256(repr(asked).encode()).hexdigest()
    if key not in kept:
        said = oracle(ids, first, position, read.after(before))
        kept[key] = (
            np.zeros((2, 0))
            if said is None
            else np.array([[said.unsettled, *said.ids], [said.unknown, *said.logprobs]])
        )
    if not kept[key].size:
        return None
    (unsettled, *tokens), (unknown, *logprobs) = kept[key].tolist()
    return NextToken(np.array(tokens, np.int64), np.array(logprobs), unsettled, unknown)


def _ideal_logits(batch: kd.AlignedBatch, found: Mapping[int, NextToken], vocab: int) -> Tensor:
    """Let a student predict what the oracle does, at the labels where that was asked; elsewhere nothing is read."""
    masses = torch.full((len(batch.labels), vocab), SMOOTH / vocab, dtype=torch.float64)
    for label, next_token in found.items():
        masses[label, torch.from_numpy(next_token.ids)] += (1 - SMOOTH) * np.exp(next_token.logprobs)
    return masses.log().float()


def _signal(read: ReadText, batch: kd.AlignedBatch, k: int) -> kd.TeacherSignal:
    (side,) = batch.teachers
    every = top_k(read.logprobs, k, real=read.vocab, rows=side.token_positions)
    tokens = read.logprobs[side.token_positions, side.next_ids]
    return kd.TeacherSignal(every.at(side.group_first), tokens, side.token_group, side.next_ids, every)


def _distances(
    method: kd.Method[Any, Any], logits: Tensor, signal: kd.TeacherSignal, batch: kd.AlignedBatch
) -> dict[int, Distance]:
    """Compare a method's target with the oracle at each label that it has one for; `logits` are the oracle's."""
    (side,) = batch.teachers
    if type(method).compare is kd.Method.compare:
        return {
            int(label): Distance(None, None, None, _loss(method, logits, signal, batch, group))
            for group, label in enumerate(side.student_rows)
        }
    compared = method.explain(logits, signal, batch)
    masked = compared.ids < 0
    p, q = (
        _with_rest(side.double().exp().masked_fill(masked, 0))
        for side in (compared.student, compared.teacher)
    )
    whole = _entropy(logits.double().exp())
    terms = torch.where(p > 0, p * (p.log() - q.clamp(min=1e-300).log()), 0).sum(-1)
    has_target = masked.all(-1).logical_not().tolist()
    found = {label: Distance(None, 1.0, left_out, 0.0) for label, left_out in enumerate(whole.tolist())}
    for row, label in enumerate(compared.rows.tolist()):
        if has_target[row]:
            left_out = float(whole[label] - _entropy(p[row]))
            loss = float(compared.divergence[row])
            found[label] = Distance(float(terms[row]), float(p[row, -1]), left_out, loss)
    return found


def _with_rest(masses: Tensor) -> Tensor:
    return torch.cat((masses, (1 - masses.sum(-1, keepdim=True)).clamp(min=LEAST)), -1)


def _entropy(masses: Tensor) -> Tensor:
    return -torch.xlogy(masses, masses).sum(-1)


def _loss(
    method: kd.Method[Any, Any], logits: Tensor, signal: kd.TeacherSignal, batch: kd.AlignedBatch, group: int
) -> float:
    """Give the loss of one group, for a method that reads the boundary alone."""
    (side,) = batch.teachers
    at = slice(group, group + 1)
    top = kd.TopK(signal.top.ids[at], signal.top.logprobs[at])
    inputs = LossInputs(method, kd.TeacherSignal(top), method.pair.vocab_s, side.student_rows[at])
    return float(loss_sums(logits, batch.labels, [inputs]).kd[0].kd)


COLUMNS = ("with a target", "KL, nats", f"above {FAR}", "missed", "left out, nats", "loss of the oracle")


def _distances_grid(distances: Mapping[str, Mapping[Place, Distance]], shares: Mapping[str, float]) -> Grid:
    rows: list[tuple[Any, ...]] = []
    for name, of_places in distances.items():
        of_kind = {
            kind: [distance for place, distance in of_places.items() if place.kind == kind] for kind in KINDS
        }
        of_kind = {kind: these for kind, these in of_kind.items() if these}
        rows += [
            (name, kind, len(these), *_means(these, [1.0] * len(these))) for kind, these in of_kind.items()
        ]
        weights = [shares[kind] / len(these) for kind, these in of_kind.items() for _ in these]
        every = [distance for these in of_kind.values() for distance in these]
        rows.append((name, "all", len(every), *_means(every, weights)))
    return Grid("targets beside the oracle", ("method", "group", "positions", *COLUMNS), rows)


def _means(distances: Sequence[Distance], weights: Sequence[float]) -> tuple[float | None, ...]:
    """Average over positions; KL and what is above over those with a target alone."""

    def mean(values: Sequence[float | None]) -> float | None:
        there = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
        return float(np.average([v for v, _ in there], weights=[w for _, w in there])) if there else None

    kl = [distance.kl for distance in distances]
    missed = mean([distance.missed for distance in distances])
    return (
        None if missed is None else mean([float(value is not None) for value in kl]),
        mean(kl),
        mean([None if value is None else float(value > FAR) for value in kl]),
        missed,
        mean([distance.left_out for distance in distances]),
        mean([distance.loss for distance in distances]),
    )


def _shown(
    pair: kd.TokenizerPair,
    method: kd.Method[Any, Any],
    logits: Tensor,
    signal: kd.TeacherSignal,
    batch: kd.AlignedBatch,
    known: Mapping[int, NextToken],
) -> list[tuple[float, tuple[str, ...]]]:
    """Write out what the oracle and a method's target say at each label."""
    compared = method.explain(logits, signal, batch)
    measured = _distances(method, logits, signal, batch)
    view, ids = pair.student.view, batch.student["input_ids"][0].tolist()

    def likeliest(tokens: Sequence[int], masses: Sequence[float]) -> str:
        best = sorted(zip(masses, tokens, strict=True), reverse=True)[:4]
        return "  ".join(
            f"{view.literals[i].decode(errors='replace')!r} {mass:.3f}" for mass, i in best if i >= 0
        )

    lines = []
    for row, label in enumerate(compared.rows.tolist()):
        if label not in known:
            continue
        at = int(batch.label_positions[label]) + 1
        before = b"".join(view.literals[i] for i in ids[:at]).decode(errors="replace")
        cells = (
            f"{before[-24:]!r} + {view.literals[ids[at]].decode(errors='replace')!r}",
            likeliest(known[label].ids.tolist(), np.exp(known[label].logprobs).tolist()),
            likeliest(compared.ids[row].tolist(), compared.teacher[row].exp().tolist()),
        )
        lines.append((measured[label].kl or 0.0, cells))
    return lines


def _worst(shown: Sequence[tuple[float, tuple[str, ...]]], size: int) -> Grid:
    worst = sorted(shown, key=lambda line: -line[0])[:size]
    columns = ("KL, nats", "text + the student's next token", "oracle", "target")
    return Grid("where spelling is farthest", columns, [(kl, *cells) for kl, cells in worst])


def _lines(chosen: Sequence[Place], found: Mapping[Place, NextToken]) -> list[Line]:
    unknown, unsettled = (
        [getattr(each, name) for each in found.values()] for name in ("unknown", "unsettled")
    )
    return [
        Line("positions measured", len(found), ""),
        Line("positions without an oracle", len(chosen) - len(found), ""),
        Line("probability that was not looked at, mean", float(np.mean(unknown)), "", at_most=0.05),
        Line("the same, the most", max(unknown), ""),
        Line("probability on texts that may go on, mean", float(np.mean(unsettled)), ""),
        Line("the same, the most", max(unsettled), ""),
    ]


def _facts(
    options: argparse.Namespace, pair: kd.TokenizerPair, texts: Sequence[Text], shares: Mapping[str, float]
) -> Mapping[str, Any]:
    return {
        "pair": f"{pair.name_t} → {pair.name_s}",
        "texts": f"{len(texts)}: answers of {options.data.name}, and docstrings of Python",
        "positions by kind of group": ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items()),
        "all": "weighed by how frequent each kind is in the texts",
        "KL": f"of the oracle to the target, where there is one; a rest has at least {LEAST:g}",
        "missed": "the oracle's probability of what is no outcome",
        "left out": "entropy of the oracle within outcomes, of which nothing is taught",
        "loss of the oracle": "what the method makes of a student that predicts as the oracle",
    }
