"""Rows that lie end to end are what they are by themselves: logits, losses, gradients."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from cdm_toolkit.forward import keeps_rows_apart
from cdm_toolkit.kd import CDM, KL, ULD, AlignedBatch, ExactMatch, Spelling, TokenizerPair

from .conftest import Side

TEXTS = [
    "the cat sits on the hill",
    "a dog",
    "then it runs over the mat and sleeps by the old door",
    "it is late",
    "so",
]
ROWS = [{"prompt": f"say {text}", "completion": text} for text in TEXTS]


@pytest.fixture
def padded(two: TokenizerPair) -> AlignedBatch:
    return two.collate(ROWS)


@pytest.fixture
def packed(two: TokenizerPair) -> AlignedBatch:
    return two.collate(ROWS, pack=True)


def test_nothing_but_the_layout_differs(padded: AlignedBatch, packed: AlignedBatch) -> None:
    assert packed.rows == padded.rows
    assert packed.tokens == padded.tokens == int(padded.student["attention_mask"].sum())
    assert torch.equal(packed.labels, padded.labels)
    assert torch.equal(packed.label_row, padded.label_row)
    for one, other in zip(packed.teachers, padded.teachers, strict=True):
        assert one.tokens == other.tokens == int(other.inputs["attention_mask"].sum())
        for name in ("row_positions", "token_group", "next_ids", "student_rows", "student_token_rows"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert packed.student["input_ids"].numel() < 0.75 * padded.student["input_ids"].numel()
    assert set(packed.student) == {"input_ids", "position_ids"}


@pytest.mark.parametrize("method", [ExactMatch, Spelling, CDM, ULD])
def test_losses_and_gradients_are_those_of_padded_rows(
    two: TokenizerPair, teacher: Side, student: Side, padded: AlignedBatch, packed: AlignedBatch, method: Any
) -> None:
    losses, gradients, labels = [], [], []
    loss_of = method(two)
    for batch in (padded, packed):
        student.model.zero_grad()
        out = loss_of(batch.student_logits_at(student.model), loss_of.signal(teacher.model, batch), batch)
        (out.ce + out.kd).backward()
        losses.append(torch.stack((out.ce, out.kd)).detach())
        labels.append(out.sums.label_logprobs)
        gradients.append([p.grad.clone() for p in student.model.parameters() if p.grad is not None])
    assert torch.allclose(*losses, atol=1e-5)
    assert torch.allclose(*labels, atol=1e-5), "row by row"
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True))
    student.model.zero_grad()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_row_sees_another(two: TokenizerPair, student: Side, attention: str) -> None:
    batch = two.collate(ROWS, pack=True)
    student.model.set_attn_implementation(attention)
    ids = batch.student["input_ids"].clone()
    ids.flatten()[batch.label_positions[batch.label_row == 2][:3]] = 5
    other = replace(batch, student={**batch.student, "input_ids": ids})
    with torch.no_grad():
        logits, of_other = (each.student_logits_at(student.model) for each in (batch, other))
    student.model.set_attn_implementation("sdpa")
    same = batch.label_row != 2
    assert torch.equal(logits[same], of_other[same])
    assert not torch.allclose(logits[~same], of_other[~same])


def test_models_are_asked_whether_they_keep_rows_apart(
    student: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keeps_rows_apart(student.model)
    assert keeps_rows_apart(deepcopy(student.model).bfloat16())
    forward = type(student.model).forward

    def without_positions(self: Any, *arguments: Any, position_ids: Any = None, **more: Any) -> Any:
        return forward(self, *arguments, **more)

    monkeypatch.setattr(type(student.model), "forward", without_positions)
    assert not keeps_rows_apart(student.model)


def test_one_tokenizer(same: TokenizerPair, teacher: Side, other: Side) -> None:
    losses = []
    for pack in (False, True):
        batch = same.collate(ROWS, pack=pack)
        method = KL(same)
        losses.append(
            method(batch.student_logits_at(other.model), method.signal(teacher.model, batch), batch).kd
        )
    assert torch.allclose(*losses, atol=1e-5)
