"""Layers are left out by their influence, and what is left is a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from cdm_toolkit.errors import BadOption, CdmError
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.prune_layers import (
    block_influence,
    decoder_layers,
    influence_of,
    keep_layers,
    prune_layers,
)
from cdm_toolkit.hub.students import new_student, transplant
from cdm_toolkit.hub.tokenizers import Loaded

GOLDEN = Path(__file__).parents[1] / "data" / "short_gpt_golden.npz"
"""Hidden states and influences of sramshetty/ShortGPT, short_gpt/metrics.py at the commit in the file."""


def test_influence_is_that_of_the_published_implementation() -> None:
    golden = np.load(GOLDEN)
    hidden = torch.from_numpy(golden["hidden"])
    found = influence_of(hidden[:-1], hidden[1:])
    assert found.flatten(1).numpy() == pytest.approx(golden["influence"], abs=1e-6)


WIDTH = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
LLAMA = WIDTH | {"intermediate_size": 48, "num_key_value_heads": 1}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOW = {"sliding_window": 8, **LLAMA, **IDS}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=2, **IDS)),
    "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **WIDTH, **IDS)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=16, **WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(use_sliding_window=True, max_window_layers=2, **WINDOW)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(no_rope_layer_interval=2, **LLAMA, **IDS)),
}


def _model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


SEQUENCES = [np.arange(3, 3 + length, dtype=np.int32) for length in (5, 20, 1, 13)]


@pytest.mark.parametrize("batch_tokens", [1, 40, 2048])
def test_influence_is_a_mean_over_tokens_without_padding(
    batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdm_toolkit.forward.TOKENS_AT_ONCE", batch_tokens)
    model = _model("gpt2")
    found = block_influence(model, SEQUENCES)
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
    expected = []
    for ids in SEQUENCES:
        with torch.no_grad():
            states = model(torch.from_numpy(ids).long()[None], output_hidden_states=True).hidden_states
        expected.append(torch.stack([influence_of(a[0], b[0]) for a, b in pairwise(states)]))
    mean = torch.cat(expected, dim=1).mean(1).numpy()
    assert found[:-1] == pytest.approx(mean[:-1], abs=1e-5)
    assert found[-1] != pytest.approx(mean[-1], abs=1e-3), "states after the final norm are no layer's output"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kept", [(0, 3), (1, 2, 3), (3,)])
def test_the_smaller_model_is_read_as_it_was_made(name: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    model = _model(name)
    smaller = keep_layers(model, kept)
    smaller.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert read.config.num_hidden_layers == len(decoder_layers(read)) == len(kept)
    for nth, i in enumerate(kept):
        old, new = decoder_layers(model)[i].state_dict(), decoder_layers(read)[nth].state_dict()
        assert all(torch.equal(old[key], new[key]) for key in old)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, smaller(ids).logits)
        assert torch.allclose(_by_hand(model, kept, ids), read(ids).logits, atol=1e-5)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (read.get_output_embeddings().weight is read.get_input_embeddings().weight)


def _by_hand(model: PreTrainedModel, kept: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
    """Run the whole model, with the layers that are left out replaced by nothing."""

    def skip(_layer: object, args: tuple, kwargs: dict, output: object) -> object:
        before = args[0] if args else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    layers = decoder_layers(model)
    hooks = [
        layer.register_forward_hook(skip, with_kwargs=True) for i, layer in enumerate(layers) if i not in kept
    ]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_of_keys_and_values_changes_nothing(name: str) -> None:
    smaller = keep_layers(_model(name), (1, 3))
    prompt = torch.arange(3, 15)[None]
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (smaller.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


def _neo() -> PreTrainedModel:
    types = [[["global", "local"], 2]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=100, hidden_size=32, num_layers=4, num_heads=2, attention_types=types, **IDS)
    )


def _moe() -> PreTrainedModel:
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(mlp_only_layers=[0], **experts, **LLAMA, **IDS))


@pytest.mark.parametrize("make", [_neo, _moe])
def test_layers_that_depend_on_their_number_are_refused(make: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(BadOption, match="depends on its number"):
        keep_layers(make(), (1, 2))


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = _model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(BadOption, match="no list of 7 layers was found in LlamaForCausalLM"):
        decoder_layers(model)


# With a tokenizer


@pytest.fixture(scope="module")
def source(loaded: Callable[[str], Loaded], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model of six layers, of which the second and the fourth do next to nothing."""
    folder = tmp_path_factory.mktemp("source") / "model"
    model = new_student(loaded("mistral"), "16m", folder, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
        for i, scale in ((1, 1e-3), (3, 1e-2)):
            for name, parameter in decoder_layers(model)[i].named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(scale)
    model.save_pretrained(folder)
    return folder


TEXTS = ["Natalia sold 48 clips in April.", "", "And then half as many in May."]


def test_layers_of_least_influence_go(source: Path, loaded: Callable[[str], Loaded]) -> None:
    model, view = load_model(str(source)), loaded("mistral").view
    count = len(decoder_layers(model))
    _, pruned = prune_layers(model, view, count - 2, TEXTS)
    assert pruned.removed == (1, 3)
    assert pruned.influence[1] < pruned.influence[3] < min(pruned.influence[i] for i in pruned.kept)
    for layers in (0, -1, count, count + 1):
        with pytest.raises(BadOption, match=f"1 to {count - 1}: the model has {count}"):
            prune_layers(model, view, layers, TEXTS)
    with pytest.raises(CdmError, match="empty"):
        prune_layers(model, view, 2, [""])


@pytest.mark.parametrize("tokenizer", [None, "gpt2"])
def test_fewer_layers_with_and_without_another_vocabulary(
    source: Path, loaded: Callable[[str], Loaded], tmp_path: Path, tokenizer: str | None
) -> None:
    old = load_model(str(source))
    count = len(decoder_layers(old))
    given = transplant(str(source), tokenizer, tmp_path / "out", layers=count - 2, texts=TEXTS)
    new = load_model(str(tmp_path / "out"))
    assert given.pruned is not None
    assert given.pruned.removed == (1, 3), "measured with the tokenizer that the model was trained with"
    assert given.parameters == new.num_parameters()
    for nth, i in enumerate(given.pruned.kept):
        mine, its = decoder_layers(old)[i].state_dict(), decoder_layers(new)[nth].state_dict()
        assert all(torch.equal(mine[key], its[key]) for key in mine)
    same = torch.equal(old.get_input_embeddings().weight[:32_000], new.get_input_embeddings().weight[:32_000])
    assert same == (given.rows is None) == (tokenizer is None)
    assert given.vocab_size == new.config.vocab_size == (32_000 if tokenizer is None else 50_257)
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert facts["layers"] == {"influence": list(given.pruned.influence), "removed": [1, 3]}
    assert len(facts["fingerprints"]["texts"]) == 64


def test_nothing_to_do_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CdmError, match="`tokenizer`, `entries` or `layers`"):
        transplant(str(source), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
