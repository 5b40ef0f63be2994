"""Teachers: what is said at the groups of a batch, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cdm_toolkit.distill.collate import Batch, Collator
from cdm_toolkit.distill.config import Positions
from cdm_toolkit.distill.data import Features, build_features, side_of
from cdm_toolkit.distill.losses.record import TopK
from cdm_toolkit.distill.rows import read_rows
from cdm_toolkit.distill.teacher import OnlineTeacher, RememberingTeacher
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_tokenizer

K = 7


@pytest.fixture(scope="module")
def features(tiny) -> list[Features]:
    student, teacher = side_of(load_tokenizer(tiny.student)), side_of(load_tokenizer(tiny.teacher))
    return build_features(read_rows(tiny.data)[:4], student, teacher)[0]


@pytest.fixture(scope="module")
def online(tiny) -> OnlineTeacher:
    model = load_model(tiny.teacher)
    return OnlineTeacher(model, vocab_t=model.config.vocab_size, k=K)


@pytest.mark.parametrize("positions", ["boundary", "mean"])
def test_equals_each_row_by_itself(
    online: OnlineTeacher, features: list[Features], positions: Positions
) -> None:
    """Right and left padding, batch 4 and 1: the same distributions."""
    expected = []
    for one in features:
        logits = online.model(torch.tensor([one.teacher_ids.tolist()])).logits[0].detach()
        for t0, t1 in one.groups[:, :2].tolist():
            read = logits[[t0 - 1]] if positions == "boundary" else logits[t0 - 1 : t1 - 1]
            expected.append(read.mean(0).log_softmax(-1))
    distributions = torch.stack(expected)
    for padding in ("right", "left"):
        top = online.top_k(Collator(positions, teacher_padding=padding)(features))  # type: ignore[arg-type]
        assert torch.allclose(top.logprobs, distributions.topk(K).values, atol=1e-5)
        assert torch.allclose(distributions.gather(1, top.ids), top.logprobs, atol=1e-5)
        assert not top.logprobs.requires_grad


def test_padded_embedding_rows_are_left_out(tiny, features: list[Features]) -> None:
    model = load_model(tiny.teacher)
    rows = model.config.vocab_size
    batch = Collator()(features)
    before = OnlineTeacher(model, vocab_t=rows, k=K).top_k(batch)
    model.resize_token_embeddings(rows + 24)
    model.get_output_embeddings().weight.data[rows:] = 10 * model.get_output_embeddings().weight.data[:24]
    after = OnlineTeacher(model, vocab_t=rows, k=K).top_k(batch)
    assert torch.equal(before.ids, after.ids)
    assert torch.allclose(before.logprobs, after.logprobs, atol=1e-5)


class Counting:
    """Answers with the row's number, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def top_k(self, batch: Batch) -> TopK:
        self.asked += 1
        owner = torch.tensor(
            [row for row, n in zip(batch["rows"], batch["groups"], strict=True) for _ in range(n)]
        )
        return TopK(owner[:, None].expand(-1, K).clone(), -owner[:, None].expand(-1, K).float())


def batches(features: Sequence[Features]) -> list[Batch]:
    first, second, third, fourth = features
    return [Collator()(rows) for rows in ([first, second], [third, fourth], [fourth, second], [first, third])]


def test_remembers_each_row_whatever_its_batch(features: list[Features]) -> None:
    counting, plain = Counting(), Counting()
    remembering = RememberingTeacher(counting, room=1 << 20)
    for batch in batches(features):
        found, expected = remembering.top_k(batch), plain.top_k(batch)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.logprobs, expected.logprobs)
    assert (counting.asked, plain.asked) == (2, 4)


def test_remembers_no_more_than_it_has_room_for(features: list[Features]) -> None:
    counting = Counting()
    first = len(features[0].groups) * K * 8
    remembering = RememberingTeacher(counting, room=first)
    for batch in batches(features):
        remembering.top_k(batch)
    assert counting.asked == 4
    remembering.top_k(Collator()(features[:1]))
    assert (counting.asked, remembering.room) == (4, 0)
