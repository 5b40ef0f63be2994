"""Two small families of tokenizers, with fresh models, in place of real ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

WORDS = ["the", "a", "cat", "dog", "sits", "on", "mat", "runs", "over", "hill", "then", "it", "sleeps", "in"]


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Make sentences of few words, so that small vocabularies have whole words."""
    import random

    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) + "." for _ in range(count)]


def _byte_level(texts: list[str]) -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _metaspace(texts: list[str]) -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[*special, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # the trainer takes the byte tokens for special ones, which they are not
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(description))


@dataclass(frozen=True, slots=True)
class Tiny:
    """Folders of two fresh models whose tokenizers differ in kind, and a file of rows."""

    teacher: str
    student: str
    data: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """Make a teacher, a student and 24 rows."""
    from transformers import PreTrainedTokenizerFast

    from cdm_toolkit.hub.students import new_student

    root = tmp_path_factory.mktemp("tiny")
    texts = sentences(300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDM_CACHE", str(root / "cache"))
        byte_level = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(texts), bos_token="<|begin|>", eos_token="<|end|>"
        )
        metaspace = PreTrainedTokenizerFast(
            tokenizer_object=_metaspace(texts), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        for name, tokenizer in (("teacher", byte_level), ("student", metaspace)):
            tokenizer.save_pretrained(root / f"{name}-tokenizer")
            new_student(str(root / f"{name}-tokenizer"), "150k", root / name, seed=len(name))
        rows = [{"prompt": a, "completion": b} for a, b in zip(texts[:24], texts[24:48], strict=True)]
        data = root / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        yield Tiny(str(root / "teacher"), str(root / "student"), str(data))


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Name a file to write rows to."""
    return tmp_path / "rows.jsonl"
