"""Roles of special tokens (bos, turn_end, ...), used to match them across model families."""

from __future__ import annotations

from collections.abc import Mapping

MAP_ROLES = {
    "bos_token": "bos",
    "cls_token": "bos",
    "eos_token": "eos",
    "sep_token": "eos",
    "pad_token": "pad",
    "unk_token": "unk",
    "mask_token": "mask",
}
"""Role of each entry of a tokenizer's special token map."""

# Special tokens of known model families. The first role is the primary one.
KNOWN_MARKERS: Mapping[str, tuple[str, ...]] = {
    "<|endoftext|>": ("eos",),  # GPT-2, Qwen, SmolLM, Phi
    "</s>": ("eos",),  # Llama 2, Mistral, OPT
    "<s>": ("bos",),
    "<|im_start|>": ("turn_start",),  # ChatML
    "<|im_end|>": ("turn_end",),
    "<|begin_of_text|>": ("bos",),  # Llama 3
    "<|end_of_text|>": ("eos",),
    "<|start_header_id|>": ("header_start", "turn_start"),
    "<|end_header_id|>": ("header_end",),
    "<|eot_id|>": ("turn_end",),
    "<|eom_id|>": ("message_end",),
    "<|finetune_right_pad_id|>": ("pad",),
    "<start_of_turn>": ("turn_start",),  # Gemma
    "<end_of_turn>": ("turn_end",),
    "[INST]": ("role_user", "turn_start"),  # Mistral
    "[/INST]": ("role_assistant",),
    "[SYSTEM_PROMPT]": ("role_system", "turn_start"),
    "<|system|>": ("role_system", "turn_start"),  # Phi-3
    "<|user|>": ("role_user", "turn_start"),
    "<|assistant|>": ("role_assistant", "turn_start"),
    "<|end|>": ("turn_end",),
    "<｜begin▁of▁sentence｜>": ("bos",),  # DeepSeek
    "<｜end▁of▁sentence｜>": ("eos",),
    "<｜▁pad▁｜>": ("pad",),
    "<｜User｜>": ("role_user", "turn_start"),
    "<｜Assistant｜>": ("role_assistant", "turn_start"),
    "<｜fim▁begin｜>": ("fim_prefix",),
    "<｜fim▁hole｜>": ("fim_suffix",),
    "<｜fim▁end｜>": ("fim_middle",),
    "<|fim_prefix|>": ("fim_prefix",),  # Qwen, StarCoder
    "<|fim_middle|>": ("fim_middle",),
    "<|fim_suffix|>": ("fim_suffix",),
    "<fim_prefix>": ("fim_prefix",),
    "<fim_middle>": ("fim_middle",),
    "<fim_suffix>": ("fim_suffix",),
}


def roles_of(content: str, special_map: Mapping[str, str]) -> tuple[str, ...]:
    """List a special token's roles, the primary one first.

    The role of a known marker comes first, because a special token map often uses one token for several roles:
    Qwen's `<|im_end|>` ends a turn and is also eos, GPT-2's `<|endoftext|>` is bos, eos and unk.

    >>> roles_of("<|im_end|>", {"eos_token": "<|im_end|>"})
    ('turn_end', 'eos')
    """
    mapped = (role for key, role in MAP_ROLES.items() if special_map.get(key) == content)
    return tuple(dict.fromkeys((*KNOWN_MARKERS.get(content, ()), *mapped)))
