"""The whole CDM loss, at boundaries and on means, against a float64 twin that goes position by position."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from cdm_toolkit.kd.cdm import CDM
from cdm_toolkit.kd.loss_sums import LossInputs, loss_sums
from cdm_toolkit.kd.objective import weighted_loss
from cdm_toolkit.kd.sparse_logprobs import top_k
from cdm_toolkit.kd.types import LossSums, TeacherSignal, TopK

from .cases import World, WorldPair

VOCAB_T, VOCAB_S, K = 14, 16, 5


def exact_ids() -> np.ndarray:
    """Pair most teacher ids with a student id, in no order."""
    ids = np.random.default_rng(0).permutation(VOCAB_S)[:VOCAB_T]
    ids[[2, 7, 11]] = -1
    return ids


@pytest.fixture(scope="module")
def pair() -> WorldPair:
    """Make a pair with exact partners and no neighbours."""
    return WorldPair(
        World(
            vocab_t=VOCAB_T,
            vocab_s=VOCAB_S,
            partner=tuple(exact_ids().tolist()),
            top_k=K,
            temperature=0.8,
            rest=True,
            beta=0.5,
            tau=1.0,
            ways=(),
            beginning=(),
            longest=1,
        )
    )


@pytest.fixture
def method(pair: WorldPair) -> CDM:
    return CDM(pair, top_k=K, temperature=0.8)


@dataclass(frozen=True)
class Gathered:
    """What the loss reads of a batch."""

    student_logits: torch.Tensor
    labels: torch.Tensor
    student_rows: torch.Tensor
    student_group: torch.Tensor | None
    teacher: TopK

    def sums(self, method: CDM) -> LossSums:
        inputs = LossInputs(
            method=method,
            signal=TeacherSignal(self.teacher),
            vocab_s=VOCAB_S,
            student_rows=self.student_rows,
            student_group=self.student_group,
        )
        return loss_sums(self.student_logits, self.labels, [inputs])


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
def test_equals_twin(pair: WorldPair, mean: bool, rest: bool, exact_always: bool) -> None:
    chosen = CDM(pair, top_k=K, temperature=0.8, rest_bucket=rest, exact_always=exact_always)
    for seed in range(20):
        inputs = gathered(seed, mean=mean)
        sums = inputs.sums(chosen)
        twin = cdm_twin(inputs, temperature=0.8, rest=rest, exact_always=exact_always)
        found = (sums.ce.item(), sums.kd[0].kd.item(), sums.kd[0].matched_mass.item())
        assert found == pytest.approx(twin, rel=1e-6)


@pytest.mark.parametrize("mean", [False, True])
def test_gradient_is_that_of_finite_differences(method: CDM, mean: bool) -> None:
    inputs = gathered(3, mean=mean)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        sums = replace(inputs, student_logits=logits).sums(method)
        return weighted_loss(sums, alpha=0.3, weights=[1], labels=6, groups=[4])

    assert torch.autograd.gradcheck(loss, inputs.student_logits)


def test_of_equal_models_is_zero(method: CDM) -> None:
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
    assert inputs.sums(method).kd[0].kd.item() == pytest.approx(0, abs=1e-9)


def test_batches_add_up(method: CDM) -> None:
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

    def loss(one: Gathered, *, labels: int, groups: int) -> float:
        sums = one.sums(method)
        return weighted_loss(sums, alpha=0.4, weights=[1], labels=labels, groups=[groups]).item()

    together = loss(joined, labels=24, groups=16)
    assert together == pytest.approx(sum(loss(one, labels=24, groups=16) for one in singles), abs=1e-12)
    weighted = sum(loss(one, labels=6, groups=4) * 4 / 16 for one in singles)
    assert together == pytest.approx(weighted, abs=1e-12)


def test_permuting_positions_changes_nothing(method: CDM) -> None:
    inputs = gathered(6)
    order = torch.tensor([2, 0, 3, 1])
    permuted = replace(
        inputs,
        student_rows=inputs.student_rows[order],
        teacher=TopK(inputs.teacher.ids[order], inputs.teacher.logprobs[order]),
    )
    found, expected = (one.sums(method).kd[0].kd.item() for one in (permuted, inputs))
    assert found == pytest.approx(expected, abs=1e-12)
