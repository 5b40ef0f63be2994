"""The whole CDM loss against a float64 twin that goes position by position."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cdm_toolkit.distill.losses.cdm import CdmSettings, cdm
from cdm_toolkit.distill.losses.pick import _LogProbs, log_sum_exp, top_k
from cdm_toolkit.distill.losses.record import Gathered, LossParts, TopK, objective
from cdm_toolkit.distill.losses.sft import sft
from cdm_toolkit.vocab_map.contextual import PairTable
from cdm_toolkit.vocab_map.record import Neighbours, NeighbourTable, Sides, single

VOCAB_T, VOCAB_S, K = 14, 16, 5
SIDES = Sides(name_t="t", name_s="s", fingerprint_t="ft", fingerprint_s="fs", size_t=VOCAB_T, size_s=VOCAB_S)


def exact_ids() -> np.ndarray:
    """Pair most teacher ids with a student id, in no order."""
    ids = np.random.default_rng(0).permutation(VOCAB_S)[:VOCAB_T]
    ids[[2, 7, 11]] = -1
    return ids


def no_neighbours(size: int) -> Neighbours:
    none = np.zeros(0, np.int32)
    return Neighbours(np.zeros(size + 1, np.int64), none, none.astype(np.float32), none)


@pytest.fixture
def cdm_settings() -> CdmSettings:
    exact = single("exact", SIDES, exact_ids())
    near = NeighbourTable(
        **SIDES,
        theta=0.3,
        guards=True,
        t_to_s=no_neighbours(VOCAB_T),
        s_to_t=no_neighbours(VOCAB_S),
    )
    return CdmSettings(
        table=PairTable.from_tables(exact, near),
        exact=torch.from_numpy(exact.dense()),
        vocab_s=VOCAB_S,
        top_k=K,
        temperature=0.8,
        rest_bucket=True,
    )


def gathered(seed: int, *, tokens: int = 6, mean: bool = False) -> Gathered:
    """Draw logits of both models; the student's have 3 padded columns."""
    generator = torch.Generator().manual_seed(seed)

    def logits(rows: int, width: int) -> torch.Tensor:
        return 2 * torch.randn(rows, width, generator=generator, dtype=torch.float64)

    student = logits(tokens, VOCAB_S + 3).requires_grad_()
    labels = torch.randint(0, VOCAB_S, (tokens,), generator=generator)
    rows = torch.tensor([0, 1, 2, 4, 5]) if mean else torch.tensor([0, 2, 3, 5])
    group = torch.tensor([0, 0, 1, 2, 2]) if mean else None
    groups = 3 if mean else 4
    teacher = top_k(logits(groups, VOCAB_T), K, real=VOCAB_T)
    return Gathered(student, labels, rows, group, teacher)


def cdm_twin(
    inputs: Gathered, *, temperature: float, rest: bool, exact_always: bool = True
) -> tuple[float, float, float]:
    """Give ce, kd and matched mass: sums over positions, in plain NumPy."""
    z = inputs.student_logits.detach().numpy()
    assert inputs.teacher is not None
    assert inputs.student_rows is not None
    group = inputs.student_group

    def softmax(row: np.ndarray) -> np.ndarray:
        powers = np.exp(row - row.max())
        return powers / powers.sum()

    ce = -sum(np.log(softmax(row)[label]) for row, label in zip(z, inputs.labels.tolist(), strict=True))
    kd = mass = 0.0
    for i, (ids, logprobs) in enumerate(zip(inputs.teacher.ids, inputs.teacher.logprobs, strict=True)):
        rows = inputs.student_rows if group is None else inputs.student_rows[group == i]
        mine = [int(inputs.student_rows[i])] if group is None else rows.tolist()
        student = softmax(z[mine].mean(0))
        allowed = np.argsort(-student[:VOCAB_S])[:K] if not exact_always else np.arange(VOCAB_S)
        pairs = [
            (np.exp(p), student[exact_ids()[t]])
            for t, p in zip(ids.tolist(), logprobs.tolist(), strict=True)
            if exact_ids()[t] >= 0 and exact_ids()[t] in allowed
        ]
        p, q = (np.array(side) for side in zip(*pairs, strict=True)) if pairs else (np.zeros(0), np.zeros(0))
        mass += p.sum()
        if rest:
            p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        p, q = p ** (1 / temperature), q ** (1 / temperature)
        p, q = p / p.sum(), q / q.sum()
        kd += temperature**2 * (p * np.log(p / q)).sum()
    return ce, kd, mass


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("exact_always", [False, True])
def test_equals_twin(cdm_settings: CdmSettings, mean: bool, rest: bool, exact_always: bool) -> None:
    chosen = replace(cdm_settings, rest_bucket=rest, exact=cdm_settings.exact if exact_always else None)
    for seed in range(20):
        inputs = gathered(seed, mean=mean)
        parts = cdm(inputs, chosen)
        twin = cdm_twin(inputs, temperature=0.8, rest=rest, exact_always=exact_always)
        found = (parts.ce.item(), parts.kd.item(), parts.matched_mass.item())
        assert found == pytest.approx(twin, rel=1e-6)


@pytest.mark.parametrize("mean", [False, True])
def test_gradient_is_that_of_finite_differences(cdm_settings: CdmSettings, mean: bool) -> None:
    inputs = gathered(3, mean=mean)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        parts = cdm(replace(inputs, student_logits=logits), cdm_settings)
        return objective(parts, alpha=0.3, tokens=6, positions=4)

    assert torch.autograd.gradcheck(loss, inputs.student_logits)


def test_kd_alone_moves_the_student_and_only_the_student(cdm_settings: CdmSettings) -> None:
    inputs = gathered(4)
    assert inputs.teacher is not None
    logprobs = inputs.teacher.logprobs.clone().requires_grad_()
    parts = cdm(replace(inputs, teacher=TopK(inputs.teacher.ids, logprobs)), cdm_settings)
    parts.kd.backward()
    assert inputs.student_logits.grad is not None
    assert inputs.student_logits.grad.abs().sum() > 0.1


def test_of_equal_models_is_zero(cdm_settings: CdmSettings) -> None:
    """A student that says what the teacher says: for each pair the same probability, and the same rest."""
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(4, VOCAB_T, generator=generator, dtype=torch.float64).softmax(-1)
    student = torch.zeros(6, VOCAB_S, dtype=torch.float64)
    rows = torch.tensor([0, 2, 3, 5])
    exact = torch.from_numpy(exact_ids())
    for row, distribution in zip(rows.tolist(), teacher, strict=True):
        student[row, exact[exact >= 0]] = distribution[exact >= 0]
    free = student.sum(0) == 0
    student[:, free] = ((1 - student.sum(-1, keepdim=True)) / free.sum()).expand(-1, int(free.sum()))
    inputs = Gathered(
        student.log(), torch.zeros(6, dtype=torch.long), rows, None, top_k(teacher.log(), K, real=VOCAB_T)
    )
    assert cdm(inputs, cdm_settings).kd.item() == pytest.approx(0, abs=1e-9)


def test_batches_add_up(cdm_settings: CdmSettings) -> None:
    """Batch 4 is four batches of 1, each weighted by its labels and positions."""
    singles = [gathered(seed, tokens=6) for seed in range(4)]
    joined = Gathered(
        torch.cat([one.student_logits for one in singles]),
        torch.cat([one.labels for one in singles]),
        torch.cat([one.student_rows + 6 * i for i, one in enumerate(singles)]),
        None,
        TopK(
            torch.cat([one.teacher.ids for one in singles]),
            torch.cat([one.teacher.logprobs for one in singles]),
        ),
    )
    together = objective(cdm(joined, cdm_settings), alpha=0.4, tokens=24, positions=16)
    parts = [cdm(one, cdm_settings) for one in singles]
    apart = sum(objective(part, alpha=0.4, tokens=24, positions=16) for part in parts)
    weighted = sum(objective(part, alpha=0.4, tokens=6, positions=4) * 4 / 16 for part in parts)
    assert together.item() == pytest.approx(apart.item(), abs=1e-12)
    assert together.item() == pytest.approx(weighted.item(), abs=1e-12)


def test_permuting_positions_changes_nothing(cdm_settings: CdmSettings) -> None:
    inputs = gathered(6)
    order = torch.tensor([2, 0, 3, 1])
    permuted = replace(
        inputs,
        student_rows=inputs.student_rows[order],
        teacher=TopK(inputs.teacher.ids[order], inputs.teacher.logprobs[order]),
    )
    assert cdm(permuted, cdm_settings).kd.item() == pytest.approx(
        cdm(inputs, cdm_settings).kd.item(), abs=1e-12
    )


def test_sft_has_cross_entropy_alone() -> None:
    inputs = gathered(7)
    parts = sft(Gathered(inputs.student_logits, inputs.labels))
    expected = torch.nn.functional.cross_entropy(inputs.student_logits, inputs.labels, reduction="sum")
    assert parts.ce.item() == pytest.approx(expected.item())
    assert (parts.kd.item(), parts.pairs.item()) == (0, 0)


def test_nothing_to_divide_by() -> None:
    zero = torch.tensor(0.0)
    assert objective(LossParts(zero, zero, zero, zero), alpha=0.5, tokens=0, positions=0).item() == 0


@pytest.mark.parametrize("mean", [False, True])
def test_traces_on_cuda_without_a_stray_cpu_tensor_or_a_host_sync(
    cdm_settings: CdmSettings, mean: bool
) -> None:
    """Trace the loss under FakeTensorMode, which needs no GPU, at the sizes of a small real batch.

    The engine of autograd crashes on fake CUDA tensors in a CPU build of torch: the backward pass is called
    by hand.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    vocab_t, vocab_s, tokens, groups = 49_152, 32_000, 256, 200
    with FakeTensorMode():
        ids = torch.zeros(vocab_t + 1, 32, dtype=torch.long, device="cuda")
        settings = replace(
            cdm_settings,
            table=PairTable(ids, torch.zeros_like(ids, dtype=torch.int32), vocab_s),
            exact=torch.zeros(vocab_t, dtype=torch.long, device="cuda"),
            vocab_s=vocab_s,
            top_k=100,
        )
        logits = torch.zeros(tokens, vocab_s + 64, device="cuda", dtype=torch.bfloat16)
        teacher = top_k(torch.zeros(groups, vocab_t, device="cuda", dtype=torch.bfloat16), 100, real=vocab_t)
        rows = torch.zeros(groups, dtype=torch.long, device="cuda")
        labels = torch.zeros(tokens, dtype=torch.long, device="cuda")
        parts = cdm(Gathered(logits, labels, rows, rows if mean else None, teacher), settings)
        loss = objective(parts, alpha=0.5, tokens=tokens, positions=groups)
        assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)

        saved = SimpleNamespace(saved_tensors=(logits, log_sum_exp(logits), rows, rows))
        gradient, *_ = _LogProbs.backward(saved, torch.zeros(groups, device="cuda"))
        assert (gradient.device.type, gradient.dtype, gradient.shape) == ("cuda", logits.dtype, logits.shape)
