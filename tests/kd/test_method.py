"""Each method as a training loop calls it, on real models: what it gives, and what it refuses."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from cdm_toolkit.errors import BadOption, CdmError, TokenizerMismatch
from cdm_toolkit.kd import (
    ALM,
    CDM,
    KL,
    ULD,
    AlignedBatch,
    AlignedTeacherBatch,
    ExactMatch,
    Likelihood,
    LossOutput,
    Method,
    Spelling,
    TeacherSignal,
    TokenizerPair,
    TopK,
    find_method,
    methods,
)
from cdm_toolkit.kd.loss_sums import LossInputs, following_groups, loss_sums
from cdm_toolkit.kd.sparse_logprobs import log_sum_exp, top_k
from cdm_toolkit.kd.types import SignalRequest
from cdm_toolkit.teachers import Local

from .conftest import Side

ROWS: list[dict[str, Any]] = [
    {"prompt": "How many apples are left?", "completion": "There are 12 apples, so 5 + 7 = 12."},
    {"text": "Two naïve cats sat on the mat."},
    {"question": "Who?", "answer": "Nobody knows."},
]
every_method = pytest.mark.parametrize("name", methods())


@pytest.fixture(scope="module")
def case(
    two: TokenizerPair,
    same: TokenizerPair,
    nested: TokenizerPair,
    teacher: Side,
    student: Side,
    other: Side,
    nested_student: Side,
) -> Any:
    """Give the function that makes a method with a batch, a signal and the student of its pair."""

    def make(name: str, **settings: Any) -> tuple[Method[Any, Any], AlignedBatch, TeacherSignal, Any]:
        kind = find_method(name)
        pair, learner = (same, other.model) if kind.same_tokenizer else (two, student.model)
        if kind.nested_tokenizers:
            pair, learner = nested, nested_student.model
        method = kind(pair, **settings)
        batch = pair.collate(ROWS)
        return method, batch, method.signal(teacher.model, batch), learner

    return make


def values(found: LossOutput) -> list[float]:
    return [each.item() for each in (found.ce, found.kd, found.matched_mass, found.pairs)]


def by_hand(
    method: Method[Any, Any], logits: torch.Tensor, signal: TeacherSignal, batch: AlignedBatch
) -> list[float]:
    """Lay out by hand what a loss reads, and divide its sums."""
    (side,) = batch.teachers
    mean = getattr(method.settings, "positions", None) == "mean"
    inputs = LossInputs(
        method=method,
        signal=signal,
        vocab_s=method.pair.vocab_s,
        student_rows=side.student_token_rows if mean else side.student_rows,
        student_group=side.student_token_group if mean else None,
        token_rows=None if mean else side.student_token_rows,
        token_ids=None if mean else batch.labels[side.student_token_rows],
        token_group=None if mean else side.student_token_group,
        follows=None if mean else following_groups(batch, side),
    )
    sums = loss_sums(logits, batch.labels, [inputs])
    (kd,) = sums.kd
    parts = [each.item() / side.groups for each in (kd.kd, kd.matched_mass, kd.pairs)]
    return [sums.ce.item() / len(batch.labels), *parts]


@every_method
def test_whole_logits_those_at_the_labels_and_the_sums_agree(case: Any, name: str) -> None:
    method, batch, signal, student = case(name)
    with torch.no_grad():
        whole = method(student(**batch.student).logits, signal, batch)
        at_labels = batch.student_logits_at(student)
        found = method(at_labels, signal, batch)
    assert values(found) == pytest.approx(values(whole), rel=1e-5, abs=1e-6)
    assert values(found) == pytest.approx(by_hand(method, at_labels, signal, batch), rel=1e-6)
    assert (found.labels, found.groups) == (len(batch.labels), batch.teachers[0].groups)
    assert found.kd.item() > 0
    assert 0 < found.matched_mass.item() <= 1 + 1e-6
    expected = torch.nn.functional.cross_entropy(at_labels, batch.labels)
    assert found.ce.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["cdm", "exact", "min-ed", "prefix", "uld"])
def test_means_of_logits_stand_for_a_group(case: Any, name: str) -> None:
    method, batch, signal, student = case(name, positions="mean")
    assert method.signal_request.mean_logits
    with torch.no_grad():
        logits = batch.student_logits_at(student)
        found = method(logits, signal, batch)
    assert values(found) == pytest.approx(by_hand(method, logits, signal, batch), rel=1e-6)
    boundary, _, of_boundary, _ = case(name)
    assert found.kd.item() != pytest.approx(boundary(logits, of_boundary, batch).kd.item(), rel=1e-4)


@every_method
def test_trains_the_student_and_not_the_teacher(case: Any, teacher: Side, name: str) -> None:
    method, batch, signal, student = case(name)
    found = method(student(**batch.student).logits, signal, batch)
    gradients = torch.autograd.grad(0.5 * found.ce + 0.5 * found.kd, list(student.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert not signal.top.logprobs.requires_grad
    assert not found.matched_mass.requires_grad
    assert not found.pairs.requires_grad
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


@every_method
def test_tables_move_with_the_method_and_are_in_no_checkpoint(case: Any, name: str) -> None:
    method, *_ = case(name)
    tables = dict(method.named_buffers())
    assert bool(tables) == (name not in ("uld", "alm", "sampled-reverse-kl", "kl", "reverse-kl", "jsd"))
    assert {table.device.type for table in tables.values()} <= {"cpu"}
    assert method.to("meta") is method
    assert {table.device.type for table in method.buffers()} <= {"meta"}
    assert method.state_dict() == {}


def test_a_signal_is_that_of_the_model_alone(two: TokenizerPair, teacher: Side) -> None:
    """Row by row, from all of its logits, and whatever mode it is in."""
    method = Spelling(two, top_k=20)
    batch = two.collate(ROWS)
    (side,) = batch.teachers
    with torch.no_grad():
        logits = teacher.model(**batch.teacher).logits.flatten(0, 1)[side.group_positions]
    expected = top_k(logits, 20, real=two.vocab_t)
    teacher.model.train()
    found = method.signal(teacher.model, batch)
    assert teacher.model.training
    teacher.model.eval()
    assert torch.equal(found.top.ids, expected.ids)
    assert torch.allclose(found.top.logprobs, expected.logprobs, atol=1e-5)
    local = method.signal(Local(teacher.model, vocab=two.vocab_t), batch)
    assert torch.equal(local.top.ids, found.top.ids)


def test_a_teacher_computes_no_more_than_the_settings_read(two: TokenizerPair, teacher: Side) -> None:
    plain, joint = Spelling(two, joint=False), Spelling(two)
    assert plain.signal_request == SignalRequest(100)
    assert joint.signal_request == SignalRequest(100, token_logprobs=True, token_top=True)
    batch = two.collate(ROWS)
    assert plain.signal(teacher.model, batch).token_logprobs is None
    found = joint.signal(teacher.model, batch)
    assert found.token_logprobs is not None
    assert found.token_top is not None
    assert torch.equal(found.token_top.ids[batch.teachers[0].group_first], found.top.ids)


def positions_in(side: AlignedTeacherBatch) -> list[str]:
    return [field.name for field in fields(side) if isinstance(getattr(side, field.name), torch.Tensor)]


def test_a_batch_without_groups_is_cross_entropy(two: TokenizerPair, student: Side) -> None:
    batch = two.collate(ROWS)
    (side,) = batch.teachers
    none = torch.zeros(0, dtype=torch.long)
    empty = replace(
        side,
        groups_per_row=(0, 0, 0),
        tokens_per_row=(0, 0, 0),
        **dict.fromkeys(positions_in(side), none),
    )
    method = ULD(two)
    signal = TeacherSignal(TopK(none.view(0, 1).expand(0, 100), torch.zeros(0, 100)))
    found = method(batch.student_logits_at(student.model), signal, replace(batch, teachers=(empty,)))
    assert (found.kd.item(), found.groups) == (0, 0)
    assert found.ce.item() > 0


# What is refused


def refused(error: type[CdmError], call: Any) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_tokenizers_where_a_method_is_for_one(two: TokenizerPair) -> None:
    assert refused(BadOption, lambda: KL(two)) == (
        "`method` is 'kl'; give one for different tokenizers, such as spelling: teacher is not student"
    )


def test_two_tokenizers_that_do_not_nest(two: TokenizerPair) -> None:
    assert refused(BadOption, lambda: Likelihood(two)) == (
        "`method` is 'likelihood'; give one for any two tokenizers, such as spelling: the student's tokens are not "
        "parts of the teacher's, student splits a text in another way than teacher"
    )


def test_more_candidates_than_ids(two: TokenizerPair) -> None:
    assert refused(BadOption, lambda: ULD(two, top_k=701)) == (
        "`top_k` is 701; give at most 700: the smaller vocabulary has no more ids"
    )
    assert ULD(two, top_k=700).top_k == 700
    assert ALM(two).top_k == 1


def test_a_batch_of_another_pair(case: Any, same: TokenizerPair) -> None:
    method, _, signal, student = case("spelling")
    of_another = same.collate(ROWS)
    message = refused(TokenizerMismatch, lambda: method.signal(student, of_another))
    assert message.startswith("the method spelling was built for teacher and student (")
    assert "as pair, the pair given is teacher and other (" in message
    assert message.endswith("; collate the batch with the method's own pair")
    logits = torch.zeros(len(of_another.labels), 900)
    assert refused(TokenizerMismatch, lambda: method(logits, signal, of_another)) == message


def test_a_batch_of_several_teachers(case: Any) -> None:
    method, batch, signal, student = case("uld")
    several = replace(batch, teachers=batch.teachers * 2)
    logits = batch.student_logits_at(student)
    assert refused(BadOption, lambda: method(logits, signal, several)) == (
        "the number of teachers in the batch is 2; give a batch of one pair, or take `kd.Objective`, which is for "
        "several"
    )


def test_logits_that_do_not_fit(case: Any) -> None:
    method, batch, signal, student = case("uld")
    logits = batch.student_logits_at(student)
    assert refused(BadOption, lambda: method(logits[:, :699], signal, batch)) == (
        "the width of the student's logits is 699; give at least 700, a column for each id of its tokenizer: is "
        "this the pair's student?"
    )
    batch_size, time = batch.student["input_ids"].shape
    labels = len(batch.labels)
    for wrong in (
        logits[:-1],
        torch.zeros(batch_size, time - 1, 700),
        torch.zeros(batch_size - 1, time, 700),
    ):
        assert refused(BadOption, lambda wrong=wrong: method(wrong, signal, batch)) == (
            f"the shape of the student's logits is {tuple(wrong.shape)}; give whole logits "
            f"({batch_size}, {time}, vocab), or those at the labels ({labels}, vocab)"
        )


def test_padded_columns_are_allowed(case: Any) -> None:
    method, batch, signal, student = case("exact")
    with torch.no_grad():
        logits = batch.student_logits_at(student)
    wider = torch.cat((logits, torch.full((len(logits), 4), -torch.inf)), dim=1)
    # a row of another width is summed in another order
    expected = pytest.approx(values(method(logits, signal, batch)), rel=1e-5)
    assert values(method(wider, signal, batch)) == expected
    assert torch.allclose(log_sum_exp(wider), log_sum_exp(logits))


def test_signals_that_do_not_fit(case: Any, two: TokenizerPair, teacher: Side) -> None:
    method, batch, _, student = case("exact", top_k=20)
    logits = batch.student_logits_at(student)
    of_more = ExactMatch(two, top_k=30).signal(teacher.model, batch)
    assert refused(BadOption, lambda: method(logits, of_more, batch)) == (
        "the signal's top_k is 30; give 20, which exact was built with, or build it with top_k=30"
    )
    alm, gold = ALM(two), find_method("gold")(two, top_k=20)
    plain = method.signal(teacher.model, batch)
    assert refused(BadOption, lambda: gold(logits, plain, batch)) == (
        "the signal's token_logprobs is None; give those of the groups' tokens, which gold reads"
    )
    spelling, of_gold = Spelling(two, top_k=20), gold.signal(teacher.model, batch)
    for part, signal in (("token_ids", replace(of_gold, token_ids=None)), ("token_top", of_gold)):
        assert refused(BadOption, lambda signal=signal: spelling(logits, signal, batch)) == (
            f"the signal's {part} is None; give those of the groups' tokens, which spelling reads"
        )
    one = CDM(two, top_k=1).signal(teacher.model, batch)
    assert "which alm reads" in refused(BadOption, lambda: alm(logits, one, batch))
