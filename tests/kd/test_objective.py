"""Several teachers in one objective are the weighted sum of each by itself."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from cdm_toolkit.errors import BadOption, CdmError
from cdm_toolkit.kd import KL, AlignedBatch, Objective, Spelling, TokenizerPair, TopK, collate

from .conftest import Side

ROWS: list[dict[str, Any]] = [
    {"prompt": "How many apples are left?", "completion": "There are 12 apples, so 5 + 7 = 12."},
    {"text": "Two naïve cats sat on the mat."},
]


@pytest.fixture(scope="module")
def pairs(two: TokenizerPair, student: Side) -> tuple[TokenizerPair, TokenizerPair]:
    """Pair one student with a teacher of another tokenizer, and with one of its own."""
    return two, TokenizerPair(student.tokenizer, student.tokenizer, names=("own", "student"))


@pytest.fixture(scope="module")
def methods(pairs: tuple[TokenizerPair, TokenizerPair]) -> tuple[Spelling, KL]:
    return Spelling(pairs[0], top_k=50), KL(pairs[1], top_k=40, temperature=2)


@pytest.fixture(scope="module")
def batch(pairs: tuple[TokenizerPair, TokenizerPair]) -> AlignedBatch:
    return collate(pairs, ROWS)


@pytest.fixture(scope="module")
def own_teacher(student: Side) -> Any:
    """Give a teacher with the student's tokenizer and other weights."""
    import copy

    made = copy.deepcopy(student.model)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize(("alpha", "weights"), [(0.3, [0.25, 0.75]), (0.0, [2.0, 1.0]), (0.5, None)])
def test_is_the_weighted_sum_of_its_methods(
    methods: tuple[Spelling, KL],
    batch: AlignedBatch,
    student: Side,
    teacher: Side,
    own_teacher: Any,
    alpha: float,
    weights: list[float] | None,
) -> None:
    objective = Objective(methods, alpha=alpha, weights=weights)
    signals = objective.signals([teacher.model, own_teacher], batch)
    logits = batch.student_logits_at(student.model).detach().requires_grad_()
    found = objective(logits, signals, batch)
    alone = [
        method(logits, signal, batch.of_teacher(nth))
        for nth, (method, signal) in enumerate(zip(methods, signals, strict=True))
    ]
    assert [kd.item() for kd in found.kd] == pytest.approx([one.kd.item() for one in alone], rel=1e-6)
    assert min(kd.item() for kd in found.kd) > 1e-4
    first, second = weights or (1.0, 1.0)
    expected = alpha * alone[0].ce + (1 - alpha) * (first * alone[0].kd + second * alone[1].kd)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.ce.item() == pytest.approx(alone[1].ce.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found.loss, expected)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)


def test_takes_whole_logits_too(
    methods: tuple[Spelling, KL], batch: AlignedBatch, student: Side, teacher: Side, own_teacher: Any
) -> None:
    objective = Objective(methods)
    signals = objective.signals([teacher.model, own_teacher], batch)
    with torch.no_grad():
        whole = objective(student.model(**batch.student).logits, signals, batch)
        found = objective(batch.student_logits_at(student.model), signals, batch)
    assert found.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)


def without_groups(batch: AlignedBatch, nth: int) -> AlignedBatch:
    """Take a teacher's groups out of a batch, as where none of its rows could be aligned."""
    side, none = batch.teachers[nth], torch.zeros(0, dtype=torch.long)
    tensors = [field.name for field in fields(side) if isinstance(getattr(side, field.name), torch.Tensor)]
    nothing = (0,) * len(batch.rows)
    empty = replace(side, groups_per_row=nothing, tokens_per_row=nothing, **dict.fromkeys(tensors, none))
    return replace(batch, teachers=(*batch.teachers[:nth], empty, *batch.teachers[nth + 1 :]))


def test_a_teacher_without_a_group_counts_for_nothing(
    methods: tuple[Spelling, KL], batch: AlignedBatch, student: Side, teacher: Side, own_teacher: Any
) -> None:
    objective, part = Objective(methods, alpha=0.5), without_groups(batch, 1)
    signals = objective.signals([teacher.model, own_teacher], part)
    assert signals[1] is None
    found = objective(part.student_logits_at(student.model), signals, part)
    assert found.kd[1].item() == 0
    assert found.loss.item() == pytest.approx((0.5 * found.ce + 0.5 * found.kd[0]).item(), rel=1e-6)


def test_a_method_asks_no_teacher_about_a_batch_without_groups(
    methods: tuple[Spelling, KL], batch: AlignedBatch, student: Side
) -> None:
    part = without_groups(batch, 0).of_teacher(0)
    out = methods[0](
        part.student_logits_at(student.model), methods[0].signal(torch.nn.Identity(), part), part
    )
    assert (out.kd.item(), out.groups) == (0, 0)


def test_what_does_not_fit_the_batch_is_refused(
    methods: tuple[Spelling, KL], batch: AlignedBatch, student: Side, teacher: Side, own_teacher: Any
) -> None:
    objective = Objective(methods, alpha=0.5)
    logits = batch.student_logits_at(student.model)
    first, second = objective.signals([teacher.model, own_teacher], batch)
    with pytest.raises(BadOption, match="`signal` is None; give the teacher's: the batch has groups for it"):
        objective(logits, [first, None], batch)
    with pytest.raises(BadOption, match="the number of signals is 1; give one for each of 2 methods"):
        objective(logits, [first], batch)
    short = replace(first, top=TopK(first.top.ids[:-1], first.top.logprobs[:-1]))
    with pytest.raises(
        BadOption, match=r"the size of the signal is .*; give the signal of this batch, which has"
    ):
        objective(logits, [short, second], batch)


def test_tables_of_all_methods_move(pairs: tuple[TokenizerPair, TokenizerPair]) -> None:
    objective = Objective([Spelling(pairs[0]), KL(pairs[1])]).to("meta")
    assert {table.device.type for table in objective.buffers()} == {"meta"}


def test_what_cannot_be_weighed(methods: tuple[Spelling, KL]) -> None:
    with pytest.raises(BadOption, match=r"`alpha` is 1\.5; give a number from 0 to 1"):
        Objective(methods, alpha=1.5)
    with pytest.raises(BadOption, match=r"`weights` is \[1\.0\]; give one for each of 2 methods"):
        Objective(methods, weights=[1.0])


@pytest.mark.parametrize("wrong", ["order", "width", "top_k"])
def test_what_a_single_method_refuses_is_refused(
    methods: tuple[Spelling, KL],
    pairs: tuple[TokenizerPair, TokenizerPair],
    batch: AlignedBatch,
    student: Side,
    teacher: Side,
    own_teacher: Any,
    wrong: str,
) -> None:
    """An objective checks the pairs, the logits and the signals as its methods do."""
    objective = Objective(methods)
    signals = objective.signals([teacher.model, own_teacher], batch)
    logits = batch.student_logits_at(student.model)
    if wrong == "order":
        batch = collate(pairs[::-1], ROWS)
    elif wrong == "width":
        logits = logits[:, :-1]
    else:
        signals = [signals[1], signals[0]]
    with pytest.raises(CdmError) as caught:
        objective(logits, signals, batch)
    assert "\n" not in str(caught.value)
