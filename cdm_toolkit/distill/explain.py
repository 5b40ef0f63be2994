"""What is taught at each position of one row: candidates of the teacher, and what methods make of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn

from cdm_toolkit.alignment.groups import Group
from cdm_toolkit.errors import BadOption, NothingToTrain
from cdm_toolkit.kd.batch import AlignedBatch, AlignedTeacherBatch
from cdm_toolkit.kd.continuations import ReadText
from cdm_toolkit.kd.method import Method, Teacher
from cdm_toolkit.kd.next_token_oracle import NextTokenOracle, OracleQuery
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.sparse_logprobs import log_sum_exp, sparse_logprobs
from cdm_toolkit.kd.types import Comparison, SignalRequest, TeacherSignal
from cdm_toolkit.tokdiff.view import TokenizerView

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class NextToken:
    """A token of the text, with the log-probability that its model gives it after all tokens before."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the teacher's top k; `spelled` are the student tokens that write the same, empty where none do."""

    id: int
    probability: float
    spelled: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A student id with the probabilities that a method compares there, before any temperature."""

    id: int
    teacher: float
    student: float


@dataclass(frozen=True, slots=True)
class ComparedPosition:
    """What a method compares at one position; `share` is the part of the row's whole divergence."""

    divergence: float
    share: float
    outcomes: tuple[Outcome, ...]
    """By the teacher's probability, largest first."""
    rest: tuple[float, float]
    """Probability on no outcome, of the teacher and of the student."""


@dataclass(frozen=True, slots=True)
class ExplainedGroup:
    """A group: its tokens on both sides, and what the teacher predicts before it."""

    kind: str
    teacher: tuple[NextToken, ...]
    student: tuple[int, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class ExplainedPosition:
    """A position of the student, at which it predicts `follows`.

    `position` counts the student's tokens; `group` is the index of the group of the token that follows, None for
    one that is not aligned, and `before` how many tokens of the group stand before it. There is one of `compared`
    for each method, None where that compares nothing here.
    """

    position: int
    follows: NextToken
    group: int | None
    before: int
    compared: tuple[ComparedPosition | None, ...]


@dataclass(frozen=True, slots=True)
class ExplainedMethod:
    """A method and its KD loss on the row, a group; `rest_bucket` says whether the rest is compared, too."""

    name: str
    kd: float
    rest_bucket: bool


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """What is taught by one row. `ce` is the student's cross-entropy, a label, in nats."""

    teacher: TokenizerView
    student: TokenizerView
    student_ids: tuple[int, ...]
    groups: tuple[ExplainedGroup, ...]
    positions: tuple[ExplainedPosition, ...]
    methods: tuple[ExplainedMethod, ...]
    ce: float


ORACLE = "oracle"
"""What the oracle is called beside the methods."""


@torch.no_grad()
def explain(
    batch: AlignedBatch,
    methods: Mapping[str, Method[Any, Any]],
    teacher: Teacher,
    student: nn.Module,
    *,
    oracle: tuple[NextTokenOracle, nn.Module] | None = None,
) -> Explanation:
    """Show what methods make of a teacher's predictions for a batch of one row.

    `methods` come by the names that they are shown under, all of the pair that collated the batch. The divergences
    of one add up to its KD loss. An `oracle` of the same pair, with the teacher's model, comes behind the methods as
    one more, `ORACLE`: KL(oracle ‖ student) at each position of a group that it has an answer for. BadOption for
    several rows, and for a method without outcomes over student ids; NothingToTrain for a row without groups.
    """
    if len(batch.rows) != 1:
        raise BadOption("the number of rows in the batch", len(batch.rows), "one row")
    (side,) = batch.teachers
    if side.empty:
        raise NothingToTrain("the row", "its tokens cannot be aligned with the teacher's")
    logits = batch.student_logits_at(student)
    signals: dict[SignalRequest, TeacherSignal] = {}
    shown, compared = [], []
    for name, method in methods.items():
        request = replace(method.signal_request, token_logprobs=True)
        if request not in signals:  # methods that ask the same share one pass of the teacher
            signals[request] = teacher.signal(batch, request)
        found = method.explain(logits, signals[request], batch)
        compared.append(_by_label(found, side.student_rows if method.mean_logits else None))
        shown.append((name, getattr(method.settings, "rest_bucket", True)))
    if oracle is not None:
        compared.append(_by_oracle(batch, *oracle, logits))
        shown.append((ORACLE, True))
    pair, signal = next(iter(methods.values())).pair, next(iter(signals.values()))
    return _explanation(batch, pair, logits, signal, shown, compared)


def _explanation(
    batch: AlignedBatch,
    pair: TokenizerPair,
    logits: Float[Tensor, "label vocab"],
    signal: TeacherSignal,
    shown: Sequence[tuple[str, bool]],
    compared: Sequence[dict[int, ComparedPosition]],
) -> Explanation:
    """Put together what was compared under each name in `shown`, which says too whether that has a rest."""
    (side,) = batch.teachers
    every = torch.arange(len(batch.labels), device=logits.device)
    follows = sparse_logprobs(logits, log_sum_exp(logits), every, batch.labels).tolist()
    place = _places(side)
    positions = tuple(
        ExplainedPosition(
            position=position,
            follows=NextToken(label, logprob),
            group=place.get(nth, (None, 0))[0],
            before=place.get(nth, (None, 0))[1],
            compared=tuple(of_method.get(nth) for of_method in compared),
        )
        for nth, (position, label, logprob) in enumerate(
            zip(batch.label_positions.tolist(), batch.labels.tolist(), follows, strict=True)
        )
    )
    return Explanation(
        teacher=pair.teacher.view,
        student=pair.student.view,
        student_ids=tuple(batch.student["input_ids"][0].tolist()),
        groups=tuple(_groups(batch, side, signal, pair.spellings().of_t)),
        positions=positions,
        methods=tuple(
            ExplainedMethod(
                name, sum(each.divergence for each in of_method.values()) / side.groups, rest_bucket
            )
            for (name, rest_bucket), of_method in zip(shown, compared, strict=True)
        ),
        ce=-sum(follows) / len(follows),
    )


def _by_label(found: Comparison, group_rows: Tensor | None) -> dict[int, ComparedPosition]:
    """Lay out a comparison by the labels that its positions predict.

    `group_rows` has the first label of each group where a comparison is of the groups' mean logits.
    """
    rows = found.rows if group_rows is None else group_rows.index_select(0, found.rows)
    whole = float(found.divergence.double().sum())
    columns = (each.tolist() for each in (rows, found.divergence.double(), found.ids))
    teacher, student = (each.double().exp().tolist() for each in (found.teacher, found.student))
    return {
        row: _compared(divergence, divergence / whole if whole else 0.0, zip(*outcomes, strict=True))
        for row, divergence, *outcomes in zip(*columns, teacher, student, strict=True)
    }


def _by_oracle(
    batch: AlignedBatch,
    oracle: NextTokenOracle,
    model: nn.Module,
    logits: Float[Tensor, "label vocab"],
) -> dict[int, ComparedPosition]:
    """Ask the oracle at each label of a group; labels that it has no answer for are left out."""
    (side,) = batch.teachers
    read = ReadText(model, side.inputs["input_ids"][0].tolist(), vocab=oracle.pair.vocab_t)
    found = {}
    for label, (group, _) in _places(side).items():
        ids, first, position, before = OracleQuery.of(batch, label, group)
        said = oracle(ids, first, position, read.after(before))
        if said is not None:
            own = logits[label].double().log_softmax(-1).cpu().numpy()[said.ids]
            found[label] = said.ids, said.logprobs, own
    kls = {label: float(np.exp(p) @ (p - q)) for label, (_, p, q) in found.items()}
    whole = sum(kls.values())
    return {
        label: _compared(
            kls[label],
            kls[label] / whole if whole else 0.0,
            zip(said.tolist(), np.exp(p).tolist(), np.exp(q).tolist(), strict=True),
        )
        for label, (said, p, q) in found.items()
    }


def _compared(
    divergence: float, share: float, outcomes: Iterable[tuple[int, float, float]]
) -> ComparedPosition:
    kept = sorted((Outcome(*each) for each in outcomes if each[0] >= 0), key=lambda each: -each.teacher)
    rest_t = max(0.0, 1 - sum(each.teacher for each in kept))
    rest_s = max(0.0, 1 - sum(each.student for each in kept))
    return ComparedPosition(divergence, share, tuple(kept), (rest_t, rest_s))


def _places(side: AlignedTeacherBatch) -> dict[int, tuple[int, int]]:
    """Give for each label that is in a group that group, and how many of its tokens stand before."""
    rows, groups = side.student_token_rows.tolist(), side.student_token_group.tolist()
    first = dict(zip(reversed(groups), reversed(rows), strict=True))
    return {row: (group, row - first[group]) for row, group in zip(rows, groups, strict=True)}


def _groups(
    batch: AlignedBatch,
    side: AlignedTeacherBatch,
    signal: TeacherSignal,
    spellings: Int32[np.ndarray, "vocab_t longest"],
) -> Iterator[ExplainedGroup]:
    assert signal.token_logprobs is not None
    tokens = zip(side.next_ids.tolist(), signal.token_logprobs.tolist(), strict=True)
    teacher = _split([NextToken(*each) for each in tokens], side.token_group)
    student = _split(batch.labels.index_select(0, side.student_token_rows).tolist(), side.student_token_group)
    top = zip(signal.top.ids.tolist(), signal.top.logprobs.exp().tolist(), strict=True)
    for of_t, of_s, (ids, probabilities) in zip(teacher, student, top, strict=True):
        spelled = [tuple(way[way >= 0].tolist()) for way in spellings[ids]]
        candidates = tuple(Candidate(*each) for each in zip(ids, probabilities, spelled, strict=True))
        kind = Group(0, len(of_t), 0, len(of_s), exact=True).kind
        yield ExplainedGroup(kind, tuple(of_t), tuple(of_s), candidates)


def _split(values: list[Value], group: Int64[Tensor, " token"]) -> list[list[Value]]:
    """Part the tokens of all groups by group; `group` is ascending, and no group is empty."""
    ends = torch.bincount(group).cumsum(0).tolist()
    return [values[begin:end] for begin, end in pairwise([0, *ends])]
