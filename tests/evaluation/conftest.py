"""A small random model with a byte-level tokenizer of its own, made in a second."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cdm_toolkit.evaluation.evaluate import Subject
from cdm_toolkit.samples import sample_path
from cdm_toolkit.tokdiff.view import make_view

MakeSubject = Callable[..., Subject]


def _tokenizer(bos: str | None, eos: str | None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, special=True) for text in (bos, eos) if text]
    lines = sample_path("train").read_text(encoding="utf-8").splitlines()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((json.loads(line)["question"] for line in lines), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def make_subject(*, bos: str | None = "<s>", eos: str | None = "</s>", positions: int = 2048) -> Subject:
    tokenizer = _tokenizer(bos, eos)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,  # far from uniform, so that a token scored wrongly shows
    )
    special = {f"{role}_token": text for role, text in (("bos", bos), ("eos", eos)) if text}
    view = make_view("tiny", tokenizer.backend_tokenizer, special)
    return Subject("tiny", LlamaForCausalLM(config).eval(), tokenizer, view)


@pytest.fixture(scope="session")
def subject() -> Subject:
    return make_subject()


@pytest.fixture(scope="session")
def make() -> MakeSubject:
    return make_subject
