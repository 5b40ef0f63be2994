"""X-Token against its authors' code, H-KL against its formula, and the settings.

The golden file has what github.com/NVIDIA-NeMo/RL makes at commit 7ea279ab: W of `tools/x_token` for 300 ids of two
students (exact match, no reverse pass, no scale trick), and loss and gradient on random logits with a cut of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cdm_toolkit.errors import BadSettings
from cdm_toolkit.kd import XToken
from cdm_toolkit.kd.loss_sums import LossInputs, loss_sums
from cdm_toolkit.kd.sparse_logprobs import top_k
from cdm_toolkit.kd.types import TeacherSignal
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.projection import Projection, build_projection, heaviest_rows, one_to_one

from .cases import Case, WorldPair, draw
from .twins import heated, kl, l1, softmax

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "x_token_golden.npz")
BFLOAT16 = 2**-7
"""NeMo-RL's tools round weights to bfloat16, twice."""


class GoldenPair(WorldPair):
    """A pair of the sizes and with the projection of the golden file."""

    vocab_t, vocab_s = GOLDEN["teacher"].shape[-1], GOLDEN["student"].shape[-1]

    def projection(self, width: int = 4) -> Projection:
        return Projection(GOLDEN["cut_indices"], GOLDEN["cut_likelihoods"])


def golden_loss(**settings: Any) -> tuple[float, Tensor]:
    """Give the mean over the groups, and its gradient: groups of one token each, whole vocabularies."""
    pair = GoldenPair(draw("exact", 0).world)
    method = XToken(pair, **settings)
    method.top_k = pair.vocab_s
    logits = torch.from_numpy(GOLDEN["student"]).flatten(0, 1).requires_grad_()
    teacher = top_k(torch.from_numpy(GOLDEN["teacher"]).flatten(0, 1), pair.vocab_t, real=pair.vocab_t)
    # NeMo-RL's chunk ids are those of the tokens that the logits predict
    inputs = LossInputs(
        method=method, signal=TeacherSignal(teacher), vocab_s=pair.vocab_s, student_rows=torch.arange(8)
    )
    value = loss_sums(logits, torch.zeros(8, dtype=torch.long), [inputs]).kd[0].kd / 8
    value.backward()
    assert logits.grad is not None
    return value.item(), logits.grad


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("p_kl", {}),
        ("p_kl_T2", {"temperature": 2.0}),
        ("p_kl_reverse", {"reverse_kl": True}),
        ("p_kl_cut", {"batch_top_k": 20, "rest_bucket": False}),
        ("h_kl", {"formulation": "h-kl"}),
        ("h_kl_T2", {"formulation": "h-kl", "temperature": 2.0}),
        ("h_kl_ranks", {"formulation": "h-kl", "uncommon_top_k": 5}),
        ("h_kl_reverse", {"formulation": "h-kl", "reverse_kl": True}),
    ],
)
def test_whole_vocabularies_are_the_authors_value(name: str, settings: dict[str, Any]) -> None:
    value, gradient = golden_loss(**settings)
    assert value == pytest.approx(float(GOLDEN[f"{name}_value"]), abs=1e-5)
    expected = torch.from_numpy(GOLDEN[f"{name}_gradient"]).flatten(0, 1)
    assert torch.allclose(gradient, expected, atol=1e-5, rtol=0)


def rows_that_differ(student: TokenizerView, teacher: TokenizerView, name: str) -> list[int]:
    """List the sampled student ids for which W differs from that of the authors' tools."""
    sample, built = GOLDEN[f"{name}_sample"], build_projection(teacher, student)
    ids, weights = GOLDEN[f"{name}_indices"], GOLDEN[f"{name}_likelihoods"]
    return [
        int(s)
        for s, row, theirs in zip(sample, ids, weights, strict=True)
        if (row[theirs > 0].tolist() != built.ids[s][built.ids[s] >= 0].tolist())
        or not np.allclose(theirs[theirs > 0], built.weights[s][built.ids[s] >= 0], rtol=BFLOAT16)
    ]


def test_w_is_the_authors_but_where_their_rules_take_other_bytes(
    real_view: Callable[[str], TokenizerView],
) -> None:
    """Of 300 ids of GPT-2 two differ, of 299 of Mistral 141: all 128 that begin with a space among them.

    Their rules compare the strings of the vocabulary files and spell what `decode` gives: a part of a character is
    U+FFFD, a space that SentencePiece begins a token with is lost, and its `·` is taken for the byte-level BPE's sign
    for the byte B7.
    """
    gpt2, smollm2, mistral = map(real_view, ("gpt2", "smollm2", "mistral"))
    assert [gpt2.literals[s] for s in rows_that_differ(gpt2, smollm2, "gpt2_smollm2")] == [b"\xc0", b"\xf1"]
    others = rows_that_differ(mistral, smollm2, "mistral_smollm2")
    spaced = [s for s in GOLDEN["mistral_smollm2_sample"].tolist() if mistral.literals[s].startswith(b" ")]
    assert (len(others), len(spaced)) == (141, 128)
    assert set(spaced) < set(others)
    left = [mistral.literals[s] for s in others if s not in spaced]
    assert sum(data.isascii() for data in left) == 1  # </s>, which goes by its role here
    assert len(left) == 13


def test_tables_of_a_projection() -> None:
    found = Projection(
        np.array([[2, 0], [2, -1], [1, 0], [-1, -1], [1, -1]], np.int32),
        np.array([[0.7, 0.3], [1, 0], [0.5, 0.5], [0, 0], [0.6, 0]], np.float32),
    )
    assert one_to_one(found, 4, at_least=0.6).tolist() == [-1, 4, 1, -1]
    assert heaviest_rows(found, 4, 2).tolist() == [[2, 0], [4, 2], [1, 0], [-1, -1]]


def h_kl(case: Case, **settings: Any) -> LossInputs:
    world = case.world
    method = XToken(
        WorldPair(world),
        formulation="h-kl",
        top_k=min(world.top_k, world.vocab_t, world.vocab_s),
        temperature=world.temperature,
        **settings,
    )
    method.top_k = min(world.top_k, world.vocab_s)
    return LossInputs(
        method=method,
        signal=case.signal(tokens=False),
        vocab_s=world.vocab_s,
        student_rows=case.rows[case.first(case.group_s)],
    )


def h_kl_twin(case: Case, ranks: int) -> float:
    """Pair the ids, take KL over the pairs and the distances by rank, one group after the other."""
    world, total = case.world, 0.0
    pairs: dict[int, tuple[float, int]] = {}
    for s, row in enumerate(world.projection):
        if row and row[0][1] >= np.float32(0.6):
            pairs[row[0][0]] = max(pairs.get(row[0][0], (0.0, 0)), (row[0][1], -s))
    partner = {t: -s for t, (_, s) in pairs.items()}
    ranks = min(ranks, world.vocab_t - len(partner), world.vocab_s - len(partner))
    for g in range(case.groups):
        p = softmax(case.teacher_logits[case.first(case.group_t)[g], : world.vocab_t].numpy())
        q = softmax(case.logits[case.rows[case.first(case.group_s)[g]]].numpy())
        best_t = np.argsort(-p, kind="stable")[: world.top_k].tolist()
        best_s = np.argsort(-q[: world.vocab_s], kind="stable")[: world.top_k].tolist()
        paired, others_t = ([t for t in best_t if (t in partner) is of] for of in (True, False))
        others_s = [s for s in best_s if s not in partner.values()]
        whole_t = len(best_t) == world.vocab_t
        whole_s = whole_t and len(best_s) == world.vocab_s
        tempered_t = heated([p[t] for t in [*paired, *others_t]], world.temperature, not whole_t)
        chosen = [*(q[partner[t]] for t in paired), *(q[s] for s in others_s)]
        tempered_s = heated(chosen, world.temperature, not whole_s)
        cut = len(paired)
        total += kl(tempered_t[:cut], tempered_s[:cut]) + l1(
            tempered_t[cut : cut + len(others_t)][:ranks].tolist(),
            tempered_s[cut : cut + len(others_s)][:ranks].tolist(),
        )
    return world.temperature**2 * total


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("ranks", [2, 8192])
def test_h_kl_equals_its_twin(k: int, ranks: int) -> None:
    for seed in range(10):
        case = draw("x-token", seed, k=k, partners=("some", "all", "many to one")[seed % 3])
        kd = loss_sums(case.logits, case.labels, [h_kl(case, uncommon_top_k=ranks)]).kd[0].kd
        assert kd.item() == pytest.approx(h_kl_twin(case, ranks), rel=1e-6, abs=2e-6)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.usefixtures("unchecked_shapes")
def test_h_kl_has_the_gradient_of_finite_differences(reverse: bool) -> None:
    case = draw("x-token", 3, k=4)
    inputs = h_kl(case, reverse_kl=reverse)

    def loss(logits: Tensor) -> Tensor:
        return loss_sums(logits, case.labels, [inputs]).kd[0].kd

    assert torch.autograd.gradcheck(loss, case.logits.clone().requires_grad_(), eps=1e-7, atol=1e-6)


def test_faults_of_the_settings_are_told_at_once() -> None:
    with pytest.raises(BadSettings) as told:
        XToken(
            WorldPair(draw("exact", 0).world),
            formulation="pkl",
            batch_top_k=0,
            uncommon_top_k=0,
            projection=3,
            projection_width=0,
        )
    assert len(told.value.faults) == 5
    assert "did you mean p-kl?" in str(told.value)
