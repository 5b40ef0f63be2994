"""Views: identity, roles of special tokens, and tokens for display."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cdm_toolkit.errors import UnknownTokenId
from cdm_toolkit.tokdiff.roles import roles_of
from cdm_toolkit.tokdiff.view import make_view

MAP = {"bos_token": "<s>"}


def small(**changes):
    """Make a byte-level tokenizer of a few tokens."""
    vocab = {
        token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc", "<s>"])
    }
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False)])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_fingerprint_ignores_the_name_truncation_and_padding():
    tokenizer = small()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    view = make_view("another", tokenizer, MAP)
    assert view.fingerprint == make_view("one", small(), MAP).fingerprint
    assert len(view.encode("abcabcabc xyz")) == 7, "neither cut nor padded"


def test_fingerprint_ignores_how_the_file_is_written():
    description = json.loads(small().to_str())
    description["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]
    shuffled = json.dumps(dict(reversed(description.items())), indent=3)
    assert (
        make_view("a", Tokenizer.from_str(shuffled), MAP).fingerprint
        == make_view("a", small(), MAP).fingerprint
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"normalizer": normalizers.NFC()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"model": models.BPE(small().get_vocab(), [("a", "b")])},
        {
            "model": models.BPE(
                small().get_vocab() | {"abc": 257, "ab": 256 + 1 - 1} | {"zz": 300}, [("a", "b")]
            )
        },
    ],
)
def test_fingerprint_covers_what_changes_tokens(changed):
    assert make_view("a", small(**changed), MAP).fingerprint != make_view("a", small(), MAP).fingerprint


def test_fingerprint_covers_roles():
    assert (
        make_view("a", small(), {"eos_token": "<s>"}).fingerprint != make_view("a", small(), MAP).fingerprint
    )


def test_real_fingerprints_differ(real_view):
    names = ("llama3", "qwen2", "gpt2", "smollm2", "mistral", "deepseek")
    assert len({real_view(name).fingerprint for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        (
            "llama3",
            {"<|begin_of_text|>": "bos", "<|start_header_id|>": "header_start", "<|eot_id|>": "turn_end"},
        ),
        ("qwen2", {"<|im_start|>": "turn_start", "<|im_end|>": "turn_end", "<|endoftext|>": "eos"}),
        ("smollm2", {"<|im_start|>": "turn_start", "<|im_end|>": "turn_end", "<|endoftext|>": "eos"}),
        ("gpt2", {"<|endoftext|>": "eos"}),
        ("mistral", {"<s>": "bos", "</s>": "eos", "<unk>": "unk"}),
        ("gemma2", {"<start_of_turn>": "turn_start", "<end_of_turn>": "turn_end", "<pad>": "pad"}),
        (
            "deepseek",
            {"<｜begin▁of▁sentence｜>": "bos", "<｜end▁of▁sentence｜>": "eos", "<｜User｜>": "role_user"},
        ),
    ],
)
def test_special_tokens_have_roles(real_view, name, roles):
    found = {token.content: token.role for token in real_view(name).special.values()}
    assert {content: found[content] for content in roles} == roles


def test_a_token_with_two_roles_keeps_both(qwen2_view):
    end = next(token for token in qwen2_view.special.values() if token.content == "<|im_end|>")
    assert (end.role, end.roles) == ("turn_end", {"turn_end", "eos"})


def test_an_unknown_special_token_has_no_role():
    assert roles_of("<|mine|>", {"eos_token": "</s>"}) == ()
    assert roles_of("<|mine|>", {"eos_token": "<|mine|>"}) == ("eos",)


def test_token_text_shows_half_characters_and_special_tokens(gpt2_view):
    half = next(i for i, token in enumerate(gpt2_view.token_bytes) if token == b"\xe2\x80")
    assert gpt2_view.token_text(half) == r"\xe2\x80"
    assert gpt2_view.token_text(50256) == "<|endoftext|>"
    with pytest.raises(UnknownTokenId):
        gpt2_view.token_text(50257)


TIMED = """
import json, sys, time
from cdm_toolkit.tokdiff.token_bytes import token_bytes
description = json.load(sys.stdin)
start = time.process_time()
token_bytes(description)
print(time.process_time() - start)
"""


def test_a_view_of_130000_ids_is_made_in_a_moment(llama3_view):
    """In a process of its own: the type checks that tests run under take ten times as long as the function."""
    description = llama3_view.backend.to_str()
    timed = subprocess.run(
        [sys.executable, "-c", TIMED], input=description, capture_output=True, encoding="utf-8", check=True
    )
    assert float(timed.stdout) < 1.0
