"""A tiny untrained teacher and student whose tokenizers differ in kind, made of texts, without a download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_toolkit.hub.students import new_student

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 330
"""Ids of either tokenizer: all bytes, special tokens, and some merges."""


@dataclass(frozen=True, slots=True)
class TinyPair:
    """Folders of two models with their tokenizers."""

    teacher: str
    student: str


def new_tiny_pair(texts: Sequence[str], output: Path) -> TinyPair:
    """Train a byte-level and a SentencePiece-like BPE tokenizer on texts, and save a fresh model for each.

    Models are those of `new_student` of 150k parameters; the same texts give the same pair. Raises as `new_student`.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizers = {
        "teacher": PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(texts), bos_token="<|begin|>", eos_token="<|end|>"
        ),
        "student": PreTrainedTokenizerFast(
            tokenizer_object=_metaspace(texts), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ),
    }
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        tokenizer.save_pretrained(output / f"{name}-tokenizer")
        new_student(str(output / f"{name}-tokenizer"), "150k", output / name, seed=seed)
    return TinyPair(str(output / "teacher"), str(output / "student"))


def _byte_level(texts: Sequence[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _metaspace(texts: Sequence[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*special, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # the trainer takes the byte tokens for special ones, which they are not
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][: len(special)]
    return Tokenizer.from_str(json.dumps(description))
