"""Logits at positions are the rows of all logits."""

from __future__ import annotations

from typing import Any

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

from cdm_toolkit.kd.model_logits import logits_at

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
