"""All methods, through `loss_sums`: their twins, their gradients, and what holds for each of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cdm_toolkit.errors import UnknownName
from cdm_toolkit.kd import find_method, methods, spelling
from cdm_toolkit.kd.loss_sums import LossInputs, loss_sums
from cdm_toolkit.kd.method import Method
from cdm_toolkit.kd.objective import weighted_loss
from cdm_toolkit.kd.settings import fields_of
from cdm_toolkit.kd.sparse_logprobs import _SparseLogprobs, log_sum_exp, top_k
from cdm_toolkit.kd.types import KDSums, LogprobRequest, StudentLogits, TeacherSignal, TopK

from .cases import PARTNERS, Case, WorldPair, alike, cast, draw
from .twins import TWINS

MADE_OF_A_MAP = {"spelling", "cdm", "exact", "likelihood", "min-ed", "prefix"}
"""Methods that compare nothing but ids with a match."""
WORLD = draw("exact", 0).world

every_method = pytest.mark.parametrize("name", methods())


def kd_of(case: Case, name: str) -> KDSums:
    (kd,) = loss_sums(case.logits, case.labels, [case.inputs(name)]).kd
    return kd


def values(kd: KDSums) -> tuple[float, float, float]:
    return kd.kd.item(), kd.matched_mass.item(), kd.pairs.item()


def test_each_method_has_a_twin() -> None:
    assert set(TWINS) == set(methods())


@every_method
@given(
    seed=st.integers(0, 10_000),
    k=st.sampled_from([1, 2, 5, 9, 12]),
    groups=st.integers(1, 5),
    partners=st.sampled_from(PARTNERS),
    padding=st.sampled_from([0, 3]),
    sizes=st.sampled_from([(9, 12), (12, 9)]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    rest=st.booleans(),
    beta=st.sampled_from([0.1, 0.5, 0.8]),
    tau=st.sampled_from([1.0, 100.0]),
    intra_group=st.booleans(),
    joint=st.booleans(),
    both_directions=st.booleans(),
    divergence=st.sampled_from(["kl", "reverse-kl", "jsd"]),
)
@settings(max_examples=60)
def test_equals_twin(name: str, seed: int, **options: object) -> None:
    """One candidate or all ids, nobody with a partner, several with one, padded columns, groups of many tokens."""
    case = draw(name, seed, **options)  # type: ignore[arg-type]
    assert values(kd_of(case, name)) == pytest.approx(case.twin(name), rel=1e-7, abs=2e-6)


def test_the_largest_outcomes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spelling, "OUTCOMES", 2)
    for seed in range(20):
        case = draw("spelling", seed, k=9)
        fewer = replace(case, world=replace(case.world, outcomes=2))
        assert values(kd_of(case, "spelling")) == pytest.approx(fewer.twin("spelling"), rel=1e-7, abs=2e-6)
        assert fewer.twin("spelling") != case.twin("spelling")


@every_method
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
def test_equals_twin_in_training_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The sums are in float32 whatever the logits are; the twin reads the same rounded logits."""
    for seed in range(5):
        case = cast(draw(name, seed, groups=8), dtype)
        assert values(kd_of(case, name)) == pytest.approx(case.twin(name), rel=tolerance, abs=tolerance)


@every_method
@pytest.mark.parametrize(
    ("k", "kinds"), [(1, ("some",)), (4, PARTNERS), (12, ("some",))], ids=["1", "4", "12"]
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_gradient_is_that_of_finite_differences(name: str, k: int, kinds: tuple[str, ...]) -> None:
    for partners in kinds:
        case = draw(name, 3, k=k, partners=partners, temperature=0.8, tau=7.0)
        inputs = case.inputs(name)

        def loss(logits: torch.Tensor, case: Case = case, inputs: LossInputs = inputs) -> torch.Tensor:
            sums = loss_sums(logits, case.labels, [inputs])
            return weighted_loss(sums, alpha=0.3, weights=[1.7], labels=6, groups=[4])

        assert torch.autograd.gradcheck(loss, case.logits.clone().requires_grad_(), eps=1e-7, atol=1e-6)


@every_method
def test_moves_the_student_and_only_the_student(name: str) -> None:
    case = draw(name, 4, tau=3.0)
    inputs, logits = case.inputs(name), case.logits.clone().requires_grad_()
    given = inputs.signal
    of_teacher = [given.top.logprobs.clone().requires_grad_()]
    if given.token_logprobs is not None:
        of_teacher.append(given.token_logprobs.clone().requires_grad_())
    signal = replace(
        given,
        top=TopK(given.top.ids, of_teacher[0]),
        token_logprobs=of_teacher[1] if of_teacher[1:] else None,
    )
    (kd,) = loss_sums(logits, case.labels, [replace(inputs, signal=signal)]).kd
    kd.kd.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0.001
    assert all(one.grad is None for one in of_teacher)
    assert not kd.matched_mass.requires_grad
    assert not kd.pairs.requires_grad


@every_method
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_of_equal_models_is_zero(name: str, k: int, temperature: float) -> None:
    for seed in range(5):
        case = alike(name, seed, k=k, temperature=temperature)
        # x-token adds 1e-10 to each of the student's probabilities
        assert kd_of(case, name).kd.item() == pytest.approx(0, abs=2e-8)


@every_method
def test_is_not_negative(name: str) -> None:
    for seed in range(20):
        assert kd_of(draw(name, seed), name).kd.item() > -1e-12


@pytest.mark.parametrize("name", sorted(MADE_OF_A_MAP))
@pytest.mark.parametrize("rest", [True, False])
def test_without_a_pair_there_is_nothing_to_learn(name: str, rest: bool) -> None:
    case = draw(name, 5, partners="none", rest=rest)
    logits = case.logits.clone().requires_grad_()
    kd = kd_of(replace(case, logits=logits), name)
    kd.kd.backward()
    assert values(kd) == (0, 0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


@every_method
def test_a_batch_is_the_sum_of_its_texts(name: str) -> None:
    first, second = draw(name, 6, groups=3), draw(name, 7, groups=4)
    second = replace(second, world=first.world)
    joined = replace(
        first,
        logits=torch.cat((first.logits, second.logits)),
        labels=torch.cat((first.labels, second.labels)),
        teacher_logits=torch.cat((first.teacher_logits, second.teacher_logits)),
        teacher_ids=torch.cat((first.teacher_ids, second.teacher_ids)),
        group_t=torch.cat((first.group_t, second.group_t + first.groups)),
        rows=torch.cat((first.rows, second.rows + first.positions)),
        group_s=torch.cat((first.group_s, second.group_s + first.groups)),
        begins=(0, first.groups),
    )
    apart = [loss_sums(case.logits, case.labels, [case.inputs(name)]) for case in (first, second)]
    together = loss_sums(joined.logits, joined.labels, [joined.inputs(name)])
    assert together.ce.item() == pytest.approx(sum(one.ce.item() for one in apart), abs=1e-12)
    sums = [sum(side) for side in zip(*(values(one.kd[0]) for one in apart), strict=True)]
    assert values(together.kd[0]) == pytest.approx(sums, abs=1e-12)


@every_method
def test_certain_models_have_finite_gradients(name: str) -> None:
    """Probabilities of 1 and of 0 in float32, on either side."""
    for spreads in ((60.0, 2.0), (2.0, 60.0), (60.0, 60.0)):
        for seed in range(5):
            case = draw(name, seed, k=12, tau=1.0)
            logits = (spreads[0] * case.logits).float().requires_grad_()
            case = replace(case, logits=logits, teacher_logits=(spreads[1] * case.teacher_logits).float())
            kd = kd_of(case, name).kd
            kd.backward()
            assert torch.isfinite(kd)
            assert logits.grad is not None
            assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", [name for name, kind in methods().items() if kind.reads_top_k()])
def test_candidates_without_a_probability_count_for_nothing(name: str) -> None:
    """A teacher that rules ids out, with all its ids asked for."""
    case = draw(name, 8, k=9, partners="all")
    case.teacher_logits[:, [1, 4]] = -torch.inf
    case.teacher_ids.fill_(2)
    kd = kd_of(case, name)
    assert torch.isfinite(kd.kd)
    assert kd.pairs.item() == 7 * case.groups
    loud = case.logits.clone().requires_grad_()
    kd_of(replace(case, logits=loud), name).kd.backward()
    assert loud.grad is not None
    assert torch.isfinite(loud.grad).all()


@pytest.mark.parametrize("name", [name for name, kind in methods().items() if kind.reads_teacher_tokens])
def test_a_text_that_a_model_rules_out_is_finite(name: str) -> None:
    case = draw(name, 8)
    case.teacher_logits[:, 3] = -torch.inf
    case.teacher_ids.fill_(3)
    teacher_only = case.logits.clone().requires_grad_()
    kd = kd_of(replace(case, logits=teacher_only), name).kd
    kd.backward()
    assert torch.isfinite(kd)
    assert teacher_only.grad is not None
    assert torch.isfinite(teacher_only.grad).all()


@every_method
def test_a_teacher_that_is_no_number_is_not_passed_over(name: str) -> None:
    """A method that takes candidates without a number for none would train on as if nothing were."""
    case = draw(name, 8)
    case.teacher_logits[case.first(case.group_t)[1]] = torch.nan
    assert torch.isnan(kd_of(case, name).kd)


@every_method
def test_no_groups(name: str) -> None:
    case = draw(name, 9)
    inputs = case.inputs(name)
    nobody = torch.zeros(0, dtype=torch.long)
    top = TopK(inputs.signal.top.ids[:0], inputs.signal.top.logprobs[:0])
    kind = find_method(name)
    tokens = kind.reads_teacher_tokens or kind.reads_student_tokens
    signal = TeacherSignal(top)
    if inputs.method.signal_request.token_logprobs:
        assert inputs.signal.token_logprobs is not None
        signal = TeacherSignal(top, inputs.signal.token_logprobs[:0], nobody, nobody, top)
    empty = LossInputs(
        method=inputs.method,
        signal=signal,
        vocab_s=inputs.vocab_s,
        student_rows=nobody,
        token_rows=nobody if tokens else None,
        token_ids=nobody if tokens else None,
        token_group=nobody if tokens else None,
        follows=nobody.bool() if tokens else None,
    )
    (kd,) = loss_sums(case.logits, case.labels, [empty]).kd
    assert values(kd) == (0, 0, 0)


def test_a_method_does_not_see_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw("exact", 10)
    seen: list[StudentLogits] = []
    inputs = case.inputs("exact")
    select = inputs.method.select

    def looks(student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[Any]:
        seen.append(student)
        return select(student, signal)

    monkeypatch.setattr(inputs.method, "select", looks)
    loss_sums(case.logits.clone().requires_grad_(), case.labels, [inputs])
    assert not seen[0].logits.requires_grad
    assert not seen[0].lse.requires_grad


def test_unknown_method() -> None:
    with pytest.raises(UnknownName, match="did you mean gold"):
        find_method("golf")


def on_cuda(name: str, *, vocab_t: int, vocab_s: int, k: int) -> Method[Any, Any]:
    """Set a method up by hand, with tables without values: a real pair has none on fake CUDA."""

    def ids(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.long, device="cuda")

    kind = find_method(name)
    method = kind.__new__(kind)
    nn.Module.__init__(method)
    method.pair, method.top_k = WorldPair(replace(WORLD, vocab_t=vocab_t, vocab_s=vocab_s)), k
    heated = any(field.name == "temperature" for field in fields_of(kind.Settings))
    method.settings = kind.Settings(temperature=0.8) if heated else kind.Settings()
    tables = {
        "partner": ids(vocab_t),
        "claimed": ids(vocab_s).bool(),
        "partner_ids": ids(vocab_t + 1, 32),
        "partner_keys": ids(vocab_t + 1, 32).int(),
        "exact": ids(vocab_t),
        "spelling": ids(vocab_t, 8),
        "length": ids(vocab_t),
        "beginning": ids(vocab_s),
        "longest_prefix": ids(vocab_s),
        "trie_keys": ids(vocab_s),
        "trie_ends": ids(vocab_s + 1),
        "teacher_ids": ids(vocab_s, 4),
        "weights": ids(vocab_s, 4).float(),
        "preimages": ids(vocab_t, 4),
        "first_t": ids(vocab_t),
        "first_s": ids(vocab_s),
    }
    for table, values in tables.items():
        method.register_buffer(table, values, persistent=False)
    if name == "gold":
        method.matched_weight = 0.7  # a number, which only real tables have
    return method


@pytest.mark.parametrize("mean", [False, True])
@every_method
def test_traces_on_cuda_without_a_stray_cpu_tensor_or_a_host_sync(name: str, mean: bool) -> None:
    """Trace the loss under FakeTensorMode, which needs no GPU, at the sizes of a small real batch.

    The engine of autograd crashes on fake CUDA tensors in a CPU build of torch: the backward pass is called
    by hand.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind = find_method(name)
    student_tokens = kind.reads_teacher_tokens or kind.reads_student_tokens
    if mean and student_tokens:
        pytest.skip("whole tokens are rows of the labels' logits")
    vocab_s = 32_000
    vocab_t = vocab_s if kind.same_tokenizer else 49_152
    tokens, groups, k = 256, 200, 100
    with FakeTensorMode():

        def ids(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.long, device="cuda")

        method = on_cuda(name, vocab_t=vocab_t, vocab_s=vocab_s, k=k)
        logits = torch.zeros(tokens, vocab_s + 64, device="cuda", dtype=torch.bfloat16)
        teacher = top_k(torch.zeros(groups, vocab_t, device="cuda", dtype=torch.bfloat16), k, real=vocab_t)
        token = ids(240) if student_tokens else None
        inputs = LossInputs(
            method=method,
            signal=TeacherSignal(
                teacher,
                *((ids(240).float(), ids(240), ids(240)) if method.signal_request.token_logprobs else ()),
                token_top=TopK(ids(240, k), ids(240, k).float()) if method.signal_request.token_top else None,
            ),
            vocab_s=vocab_s,
            student_rows=ids(groups),
            student_group=ids(groups) if mean else None,
            token_rows=token,
            token_ids=token,
            token_group=token,
            follows=ids(groups).bool() if student_tokens else None,
        )
        sums = loss_sums(logits, ids(tokens), [inputs, None, inputs])
        loss = weighted_loss(
            sums, alpha=0.5, weights=[1, 2, 3], labels=torch.tensor(tokens), groups=[groups, 0, groups]
        )
        assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)

        saved = SimpleNamespace(saved_tensors=(logits, log_sum_exp(logits), ids(groups), ids(groups)))
        gradient, *_ = _SparseLogprobs.backward(saved, torch.zeros(groups, device="cuda"))
        assert (gradient.device.type, gradient.dtype, gradient.shape) == ("cuda", logits.dtype, logits.shape)
