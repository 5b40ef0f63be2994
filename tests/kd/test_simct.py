"""SimCT against its authors' code, and what `explain` gives of it.

The golden file has what github.com/sunjie279/SimCT- makes at commit 4dae6fcd: `span_ctkd` on two small vocabularies
and a text, its loss and gradient on log-probabilities of random models. `units` are the smallest groups of the text,
`segments` those that its own aligner makes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cdm_toolkit.kd import SimCT
from cdm_toolkit.kd.loss_sums import LossInputs, compare, loss_sums
from cdm_toolkit.kd.sparse_logprobs import top_k
from cdm_toolkit.kd.types import TeacherSignal

from .cases import Case, WorldPair, draw

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "simct_golden.npz")


def golden_inputs(groups: np.ndarray, **settings: Any) -> LossInputs:
    """Let all teacher ids be candidates, at the groups of the golden file's text."""
    vocab_t, vocab_s = GOLDEN["teacher"].shape[1], GOLDEN["student"].shape[1]
    world = replace(
        draw("exact", 0).world, vocab_t=vocab_t, vocab_s=vocab_s, partner=tuple(GOLDEN["partner"].tolist())
    )
    method = SimCT(WorldPair(world), rest_bucket=False, top_k=vocab_t, **settings)
    logits = torch.from_numpy(GOLDEN["teacher"])
    first_t, end_t, first_s, end_s = (torch.from_numpy(column).long() for column in groups.T)
    every = torch.arange(len(groups))
    ids_t = torch.from_numpy(GOLDEN["teacher_ids"]).long()
    tokens = logits.log_softmax(-1).gather(1, ids_t.unsqueeze(1)).squeeze(1)
    return LossInputs(
        method=method,
        signal=TeacherSignal(
            top_k(logits, vocab_t, real=vocab_t, rows=first_t),
            tokens,
            every.repeat_interleave(end_t - first_t),
            ids_t,
        ),
        vocab_s=vocab_s,
        student_rows=first_s,
        token_rows=torch.arange(len(GOLDEN["student"])),
        token_ids=torch.from_numpy(GOLDEN["student_ids"]).long(),
        token_group=every.repeat_interleave(end_s - first_s),
    )


@pytest.mark.parametrize("groups", ["units", "segments"])
@pytest.mark.parametrize(
    ("name", "settings", "scale"),
    [
        ("rkl", {}, 1),
        ("rkl_T2", {"temperature": 2.0}, 4),
        ("kl", {"reverse_kl": False}, 1),
    ],
)
def test_whole_vocabularies_are_the_authors_value(
    groups: str, name: str, settings: dict[str, Any], scale: int
) -> None:
    inputs = golden_inputs(GOLDEN[groups], **settings)
    logits = torch.from_numpy(GOLDEN["student"]).requires_grad_()
    labels = torch.from_numpy(GOLDEN["student_ids"]).long()
    loss_sums(logits, labels, [inputs]).kd[0].kd.backward()
    assert logits.grad is not None
    found = compare(logits.detach(), inputs).divergence / scale
    assert found.numpy() == pytest.approx(GOLDEN[f"{groups}_{name}_value"], abs=1e-5)
    assert logits.grad.numpy() / scale == pytest.approx(GOLDEN[f"{groups}_{name}_gradient"], abs=1e-5)


def test_what_is_compared_does_not_depend_on_a_constant_in_the_logits() -> None:
    """The authors' loss does: of its 26.099 nats, 25.848 are left when each row's number is added to its logits."""
    assert GOLDEN["units_rkl_value"].sum() == pytest.approx(26.099, abs=1e-3)
    assert GOLDEN["units_shifted_value"].sum() == pytest.approx(25.848, abs=1e-3)
    inputs = golden_inputs(GOLDEN["units"])
    logits = torch.from_numpy(GOLDEN["student"])
    shifted = logits + torch.arange(len(logits)).unsqueeze(1)
    found = compare(shifted, inputs).divergence
    assert found.numpy() == pytest.approx(GOLDEN["units_rkl_value"], abs=1e-5)


def loss_of(case: Case, logits: Tensor) -> Tensor:
    return loss_sums(logits, case.labels, [case.inputs("simct")]).kd[0].kd


def test_explain_has_the_loss_and_two_distributions() -> None:
    for seed in range(20):
        case = draw("simct", seed, temperature=1.0)
        found = compare(case.logits, case.inputs("simct"))
        assert found.divergence.sum().item() == pytest.approx(loss_of(case, case.logits).item())
        for side in (found.teacher, found.student):
            masses = side.exp().masked_fill(found.ids < 0, 0).sum(-1)
            assert (masses <= 1 + 1e-9).all()
        assert all(
            len(ids) == len(set(ids)) for ids in ([i for i in row if i >= 0] for row in found.ids.tolist())
        )
        assert torch.equal(found.rows, case.rows[case.first(case.group_s)])


def test_a_text_that_neither_model_cuts_alike_is_learned() -> None:
    """One teacher token, two of the student's: a student that writes both for certain has learned it."""
    case = draw("simct", 1, groups=1, partners="none", temperature=1.0)
    case = replace(
        case,
        teacher_logits=torch.full((1, 9), -1e3, dtype=torch.float64).index_fill(1, torch.tensor([3]), 0.0),
        teacher_ids=torch.tensor([3]),
        group_t=torch.tensor([0]),
        labels=torch.tensor([0, 5, 7]),
        rows=torch.tensor([1, 2]),
        group_s=torch.tensor([0, 0]),
    )
    logits = torch.zeros(3, 12, dtype=torch.float64)
    certain = logits.clone()
    certain[1, 5] = certain[2, 7] = 50.0
    assert loss_of(case, certain).item() == pytest.approx(0, abs=1e-5)
    assert loss_of(case, logits).item() > 1
