"""What a teacher in memory says at the groups of a batch."""

from __future__ import annotations

import pytest
import torch
from cdm_toolkit.distill.collate import Collator, TeacherBatch, TeacherLayout
from cdm_toolkit.distill.config import Positions
from cdm_toolkit.distill.data import Features, TeacherSide, build_features, side_of
from cdm_toolkit.distill.losses.record import TeacherSays
from cdm_toolkit.distill.rows import read_rows
from cdm_toolkit.distill.teacher import OnlineTeacher

from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_tokenizer

K = 7


@pytest.fixture(scope="module")
def features(tiny) -> list[Features]:
    student, teacher = side_of(load_tokenizer(tiny.student)), side_of(load_tokenizer(tiny.teacher))
    built, _ = build_features(read_rows(tiny.data)[:4], student, [TeacherSide(teacher)])
    return list(built)


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny.teacher)


def batch_of(features: list[Features], layout: TeacherLayout) -> TeacherBatch:
    return Collator((layout,))(features)["teachers"][0]


def says(model, features: list[Features], layout: TeacherLayout) -> TeacherSays:
    teacher = OnlineTeacher(model, vocab_t=model.config.vocab_size, k=K, mean=layout.positions == "mean")
    return teacher.says(batch_of(features, layout), [row.row for row in features])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("positions", ["boundary", "mean"])
def test_equals_each_row_by_itself(model, features: list[Features], positions: Positions, padding) -> None:
    """Right and left padding, batch 4 and 1: the same distributions."""
    expected = []
    for row in features:
        teacher = row.teachers[0]
        logits = model(torch.tensor([teacher.ids.tolist()])).logits[0].detach()
        for t0, t1 in teacher.groups[:, :2].tolist():
            read = logits[[t0 - 1]] if positions == "boundary" else logits[t0 - 1 : t1 - 1]
            expected.append(read.mean(0).log_softmax(-1))
    distributions = torch.stack(expected)
    top = says(model, features, TeacherLayout(positions, padding=padding)).top
    assert torch.allclose(top.logprobs, distributions.topk(K).values, atol=1e-5)
    assert torch.allclose(distributions.gather(1, top.ids), top.logprobs, atol=1e-5)
    assert not top.logprobs.requires_grad


@pytest.mark.parametrize("padding", ["right", "left"])
def test_whole_tokens(model, features: list[Features], padding) -> None:
    expected = []
    for row in features:
        teacher = row.teachers[0]
        ids = torch.tensor(teacher.ids.tolist())
        logprobs = model(ids[None]).logits[0].detach().log_softmax(-1)
        for t0, t1 in teacher.groups[:, :2].tolist():
            expected += [logprobs[place - 1, ids[place]].item() for place in range(t0, t1)]
    said = says(model, features, TeacherLayout(tokens=True, padding=padding))
    assert said.token_logprobs is not None
    assert said.token_logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    plain = says(model, features, TeacherLayout(padding=padding))
    assert torch.equal(said.top.ids, plain.top.ids)
    assert torch.allclose(said.top.logprobs, plain.top.logprobs, atol=1e-5)


@pytest.mark.parametrize("tokens", [False, True])
def test_padded_embedding_rows_are_left_out(tiny, features: list[Features], tokens: bool) -> None:
    model = load_model(tiny.teacher)
    rows = model.config.vocab_size
    batch = batch_of(features, TeacherLayout(tokens=tokens))
    before = OnlineTeacher(model, vocab_t=rows, k=K).says(batch, ())
    model.resize_token_embeddings(rows + 24)
    model.get_output_embeddings().weight.data[rows:] = 10 * model.get_output_embeddings().weight.data[:24]
    after = OnlineTeacher(model, vocab_t=rows, k=K).says(batch, ())
    assert torch.equal(before.top.ids, after.top.ids)
    assert torch.allclose(before.top.logprobs, after.top.logprobs, atol=1e-5)
    if tokens:
        assert torch.allclose(before.token_logprobs, after.token_logprobs, atol=1e-5)  # type: ignore[arg-type]
