"""What the publications define, put in as they write it, and what cutting at k does to it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cdm_toolkit.kd.alm import binary_kl, log1mexp
from cdm_toolkit.kd.divergences import generalised_jsd
from cdm_toolkit.kd.gold import GOLD
from cdm_toolkit.kd.loss_sums import loss_sums
from cdm_toolkit.kd.static_map import merged
from cdm_toolkit.kd.types import TopK
from cdm_toolkit.kd.uld import sorted_l1

from .cases import Case, draw, method_of
from .twins import jsd, kl, softmax


def kd_of(case: Case, name: str) -> float:
    return loss_sums(case.logits, case.labels, [case.inputs(name)]).kd[0].kd.item()


def distributions(case: Case, temperature: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Give each group's two distributions over the whole vocabularies."""
    world = case.world
    teacher = case.teacher_logits[case.first(case.group_t), : world.vocab_t].numpy()
    student = case.logits[case.rows[case.first(case.group_s)], : world.vocab_s].numpy()
    return [
        (softmax(a / temperature), softmax(b / temperature)) for a, b in zip(teacher, student, strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_uld_of_whole_vocabularies_is_the_published_sum(temperature: float) -> None:
    """Sort both, pad the shorter with zeros, add up the distances (arXiv 2402.12030)."""
    for seed in range(5):
        case = draw("uld", seed, k=12, temperature=temperature)
        expected = 0.0
        for p, q in distributions(case, temperature):
            p, q = np.sort(p)[::-1], np.sort(q)[::-1]
            expected += np.abs(np.pad(p, (0, len(q) - len(p))) - q).sum()
        assert kd_of(case, "uld") == pytest.approx(expected, rel=1e-9)


def test_uld_leaves_out_what_its_documentation_says() -> None:
    for seed in range(10):
        whole, cut = (draw("uld", seed, k=k, temperature=1.0, groups=1, padding=0) for k in (12, 3))
        ((p, q),) = distributions(whole, 1.0)
        rest_p, rest_q = 1 - np.sort(p)[-3:].sum(), 1 - np.sort(q)[-3:].sum()
        left_out = kd_of(whole, "uld") - kd_of(cut, "uld")
        assert abs(rest_p - rest_q) - 1e-5 <= left_out <= rest_p + rest_q + 1e-5


def test_shorter_side_ends_in_zeros() -> None:
    longer, shorter = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.9]])
    assert sorted_l1(longer, shorter).item() == pytest.approx(0.4 + 0.3 + 0.2)
    assert sorted_l1(shorter, longer).item() == pytest.approx(0.4 + 0.3 + 0.2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_one_tokenizer_and_all_ids_is_exact(temperature: float) -> None:
    """Softmax of logits over the temperature, as the publications have it, with nothing cut."""
    for seed in range(5):
        case = draw("kl", seed, k=9, temperature=temperature)
        pairs, scale = distributions(case, temperature), temperature**2
        assert kd_of(case, "kl") == pytest.approx(scale * sum(kl(p, q) for p, q in pairs), rel=1e-9)
        assert kd_of(case, "reverse-kl") == pytest.approx(scale * sum(kl(q, p) for p, q in pairs), rel=1e-9)
        expected = scale * sum(jsd(p, q, case.world.beta) for p, q in pairs)
        assert kd_of(case, "jsd") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "jsd"])
def test_cutting_at_k_gives_at_most_the_whole(name: str) -> None:
    for seed in range(10):
        found = [kd_of(draw(name, seed, k=k, temperature=1.0, padding=0), name) for k in (1, 4, 9)]
        assert found == sorted(found)


def test_jsd_becomes_kl_at_both_ends() -> None:
    p, q = (torch.tensor([side]).double() for side in ([0.7, 0.2, 0.1], [0.1, 0.3, 0.6]))
    forward, backward = (kl(a[0].numpy(), b[0].numpy()) for a, b in ((p, q), (q, p)))
    small = 1e-6
    assert generalised_jsd(p.log(), q.log(), small).item() / small == pytest.approx(forward, rel=1e-4)
    assert generalised_jsd(p.log(), q.log(), 1 - small).item() / small == pytest.approx(backward, rel=1e-4)


def test_jsd_of_parts_that_do_not_sum_to_one_is_not_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(200, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    assert (generalised_jsd(p.log(), (0.1 * q).log(), 0.3) >= 0).all()


def gold_by_its_trainer(case: Case) -> float:
    """Follow TRL's hybrid loss step by step, over all ids at temperature 1: products, matched, by rank."""
    world = case.world
    teacher = np.apply_along_axis(softmax, 1, case.teacher_logits[:, : world.vocab_t].numpy())
    student = np.apply_along_axis(softmax, 1, case.logits[:, : world.vocab_s].numpy())
    pairs = [(t, s) for t, s in enumerate(world.partner) if s >= 0]
    total = 0.0
    for group in range(case.groups):
        of_t = np.flatnonzero(case.group_t.numpy() == group)
        rows = case.rows.numpy()[case.group_s.numpy() == group]
        merged_t = teacher[of_t[0]] * math.prod(teacher[i, case.teacher_ids[i]] for i in of_t[1:])
        merged_s = student[rows[0]] * math.prod(student[i, case.labels[i]] for i in rows[1:])
        matched_t, matched_s = merged_t[[t for t, _ in pairs]], merged_s[[s for _, s in pairs]]
        others_t = np.sort(np.delete(merged_t, [t for t, _ in pairs]))[::-1]
        others_s = np.sort(np.delete(merged_s, [s for _, s in pairs]))[::-1]
        width = max(len(others_t), len(others_s))
        others_t, others_s = (np.pad(side, (0, width - len(side))) for side in (others_t, others_s))
        weight = len(pairs) / world.vocab_t
        total += weight * jsd(matched_t, matched_s, world.beta)
        total += (1 - weight) * np.abs(others_t - others_s).sum()
    return total


def test_gold_of_whole_vocabularies_is_its_trainers() -> None:
    for seed in range(10):
        case = draw("gold", seed, k=12, temperature=1.0, padding=0)
        assert kd_of(case, "gold") == pytest.approx(gold_by_its_trainer(case), rel=1e-9)


def test_gold_tables() -> None:
    world = replace(draw("gold", 0).world, vocab_t=4, vocab_s=6, partner=(4, -1, 0, 4), top_k=3)
    method = method_of(world, "gold")
    assert isinstance(method, GOLD)
    assert method.claimed.tolist() == [True, False, False, False, True, False]
    assert (method.matched_weight, 1 - method.matched_weight) == (0.75, 0.25)


def test_merging_adds_probabilities_up() -> None:
    top = TopK(torch.arange(4)[None], torch.tensor([[0.4, 0.3, 0.2, 0.05]]).log())
    found = merged(top, torch.tensor([[7, -1, 7, 2]]))
    masses = {
        i: p for i, p in zip(found.ids[0].tolist(), found.logprobs[0].exp().tolist(), strict=True) if i >= 0
    }
    assert masses == pytest.approx({7: 0.6, 2: 0.05})


def test_log1mexp_loses_no_digits() -> None:
    """Against its series where 1 - exp(x) is near 0, and where exp(x) is."""
    small = torch.tensor([-1e-12, -1e-7, -1e-3], dtype=torch.float64)
    assert torch.allclose(log1mexp(small), (-small).log() + small / 2, rtol=1e-7)
    large = torch.tensor([-700.0, -40.0], dtype=torch.float64)
    assert torch.allclose(log1mexp(large), -large.exp(), rtol=1e-12, atol=0)


def test_binary_kl_is_that_of_two_coins() -> None:
    for p, q in ((0.3, 0.8), (0.999, 0.01), (1e-9, 0.5)):
        heads = torch.tensor([p, q], dtype=torch.float64).log()
        found = binary_kl(*heads.split(1)).item()
        assert found == pytest.approx(kl(np.array([p, 1 - p]), np.array([q, 1 - q])), rel=1e-9)


def test_alm_does_not_ask_how_a_piece_is_cut() -> None:
    """Two tokens of probability 1/2 and one of 1/4 are alike."""
    case = draw("alm", 0, groups=1, tau=1.0)
    logits = torch.full((3, 12), -1e4, dtype=torch.float64)
    logits[:, :2] = 0.0
    teacher = torch.full((1, 9), -1e4, dtype=torch.float64)
    teacher[:, :4] = 0.0
    case = replace(
        case,
        logits=logits,
        labels=torch.tensor([0, 1, 0]),
        rows=torch.tensor([0, 1]),
        group_s=torch.tensor([0, 0]),
        teacher_logits=teacher,
        teacher_ids=torch.tensor([3]),
        group_t=torch.tensor([0]),
    )
    assert kd_of(case, "alm") == pytest.approx(0, abs=1e-12)
    assert kd_of(replace(case, labels=torch.tensor([0, 5, 0])), "alm") > 1


def test_the_mean_gradient_over_samples_is_that_of_reverse_kl() -> None:
    """Over all that the student may sample, each by its probability."""
    case = draw("sampled-reverse-kl", 0, groups=1, sizes=(9, 9))
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 9, generator=generator, dtype=torch.float64).unbind()
    student.requires_grad_()
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    (expected,) = torch.autograd.grad((p.exp() * (p - q)).sum(), student)
    total = torch.zeros(9, dtype=torch.float64)
    for sample in range(9):
        seen = replace(
            case,
            logits=student.unsqueeze(0),
            labels=torch.tensor([sample]),
            rows=torch.tensor([0]),
            group_s=torch.tensor([0]),
            teacher_logits=teacher.unsqueeze(0),
            teacher_ids=torch.tensor([sample]),
            group_t=torch.tensor([0]),
        )
        loss = loss_sums(seen.logits, seen.labels, [seen.inputs("sampled-reverse-kl")]).kd[0].kd
        (gradient,) = torch.autograd.grad(loss, student)
        total += p[sample].exp().detach() * gradient
    assert torch.allclose(total, expected, atol=1e-12)
