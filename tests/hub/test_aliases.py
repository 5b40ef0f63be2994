"""The alias table."""

from __future__ import annotations

from cdm_toolkit.hub.aliases import ALIASES


def test_names_all_aliases():
    assert set(ALIASES) == {
        "llama3",
        "qwen2",
        "gpt2",
        "opt",
        "mistral",
        "smollm2",
        "deepseek",
        "gemma2",
        "phi3",
    }
    assert all(alias.name == name and alias.licence for name, alias in ALIASES.items())


def test_every_wheel_is_pinned_and_hashed():
    for alias in ALIASES.values():
        assert (alias.wheel is None) == (alias.facts is None)
        if alias.wheel:
            assert alias.wheel.version.count(".") == 2
            assert all(len(file.sha256) == 64 for file in alias.wheel.files)


def test_llama3_has_256_special_tokens_as_meta_numbers_them(llama3_view):
    assert len(llama3_view.special) == 256
    ids = {token.content: token_id for token_id, token in llama3_view.special.items()}
    assert ids["<|begin_of_text|>"] == 128_000
    assert ids["<|end_of_text|>"] == 128_001
    assert ids["<|start_header_id|>"] == 128_006
    assert ids["<|end_header_id|>"] == 128_007
    assert ids["<|eot_id|>"] == 128_009
    assert ids["<|reserved_special_token_245|>"] == 128_255 == max(ids.values())


def test_qwen2s_special_tokens_follow_its_vocabulary(qwen2_view):
    assert {i: token.content for i, token in qwen2_view.special.items()} == {
        151_643: "<|endoftext|>",
        151_644: "<|im_start|>",
        151_645: "<|im_end|>",
    }
