"""Logits at positions are the rows of all logits, and a batch gives what each sequence gives alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from cdm_toolkit.forward import logits_at, logits_by_batch, states_by_batch

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)),
    # caps its logits after the head
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.1
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_rows_of_all_logits_and_their_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(0, 50, (3, 9)),
        "attention_mask": torch.ones(3, 9, dtype=torch.long),
    }
    at = torch.tensor([0, 8, 9, 20, 26])
    found = logits_at(model, model.get_output_embeddings(), at, **inputs)
    expected = model(**inputs).logits.flatten(0, 1)[at]
    assert torch.allclose(found, expected, atol=1e-6)

    weight = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad(logits.square().sum(), weight)[0] for logits in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks, "the hook is gone"


SEQUENCES = [np.arange(3, 3 + length, dtype=np.int32) for length in (5, 20, 0, 1, 13, 12)]
POSITIONS = [range(len(ids) // 2, len(ids)) for ids in SEQUENCES]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return MODELS["llama"]().eval()


@pytest.mark.parametrize("tokens", [1, 30, 8192])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["all", "some"])
def test_batches_give_what_each_sequence_gives_alone(
    model: LlamaForCausalLM,
    tokens: int,
    size: int | None,
    positions: list[range] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cdm_toolkit.forward.TOKENS_AT_ONCE", tokens)
    found = {}
    for batch in logits_by_batch(model, SEQUENCES, positions, size=size):
        longest = max(len(SEQUENCES[row]) for row in batch.rows)
        assert len(batch.rows) == 1 or len(batch.rows) * longest <= tokens
        assert size is None or len(batch.rows) <= size
        assert not torch.is_inference_mode_enabled(), "the mode is that of the caller"
        found |= dict(batch.by_row())
    assert found.keys() == {0, 1, 3, 4, 5}
    for row, logits in found.items():
        alone = model(torch.from_numpy(SEQUENCES[row]).long()[None]).logits[0]
        assert torch.allclose(logits, alone[positions[row] if positions else ...], atol=1e-5)


def test_as_many_logits_as_there_is_room_for(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(positions: list[range] | None) -> list[list[int]]:
        return [batch.rows for batch in logits_by_batch(model, SEQUENCES, positions)]

    monkeypatch.setattr("cdm_toolkit.batching.LOGITS_AT_ONCE", 25 * SMALL["vocab_size"])
    assert rows(None) == [[1], [4, 5], [0, 3]]
    assert rows(POSITIONS) == [[1, 4, 5], [0, 3]], "only those that are made count"
    assert rows([range(0)] * len(SEQUENCES)) == []


def test_batches_of_some_sequences_are_those_of_all(model: LlamaForCausalLM) -> None:
    whole = {tuple(batch.rows): batch.values for batch in logits_by_batch(model, SEQUENCES, size=2)}
    assert list(whole) == [(1, 4), (5, 0), (3,)]
    for only in ({0}, {1, 3}, set()):
        some = {
            tuple(batch.rows): batch.values for batch in logits_by_batch(model, SEQUENCES, size=2, only=only)
        }
        assert list(some) == [rows for rows in whole if only & set(rows)]
        assert all(torch.equal(values, whole[rows]) for rows, values in some.items())


def test_states_are_what_the_head_reads(model: LlamaForCausalLM) -> None:
    (batch,), (logits,) = states_by_batch(model, SEQUENCES), logits_by_batch(model, SEQUENCES)
    assert batch.rows == logits.rows
    with torch.no_grad():
        assert torch.allclose(model.lm_head(batch.values), logits.values, atol=1e-5)
