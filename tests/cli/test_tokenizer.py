"""`cdm tokenizer`: facts of one, differences of two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_info_names_family_and_roles(cdm) -> None:
    record = json.loads(cdm("tokenizer", "info", "qwen2", "--json").out)
    assert record["family"] == "byte-level BPE"
    assert record["normalizers"] == ["NFC"]
    assert record["special_by_role"]["turn_end"] == [{"id": 151645, "content": "<|im_end|>"}]
    assert "NFC" in cdm("tokenizer", "info", "qwen2").out


def test_diff_counts_shared_and_moved_ids(cdm) -> None:
    record = json.loads(cdm("tokenizer", "diff", "llama3", "qwen2", "--json").out)
    assert record["shared"] >= 108_000
    assert 0 < record["moved"] < record["shared"]
    assert record["same"] is False
    same = json.loads(cdm("tokenizer", "diff", "gpt2", "gpt2", "--json").out)
    assert same["same"] is True
    assert same["moved"] == same["a"]["only_here"] == same["b"]["only_here"] == 0


def test_diff_takes_t1_and_t2(cdm) -> None:
    by_option = cdm("tokenizer", "diff", "--t1", "gpt2", "--t2", "qwen2", "--json")
    assert by_option.out == cdm("tokenizer", "diff", "gpt2", "qwen2", "--json").out
    assert json.loads(by_option.out)["a"]["name"] == "gpt2"


@pytest.mark.parametrize(
    ("names", "fix"),
    [
        ((), "two tokenizers"),
        (("gpt2",), "two tokenizers"),
        (("--t2", "gpt2"), "two tokenizers"),
        (("gpt2", "--t2", "qwen2"), "not both ways"),
        (("gpt2", "qwen2", "--t1", "gpt2", "--t2", "qwen2"), "not both ways"),
    ],
)
def test_diff_wants_two_tokenizers_named_in_one_way(cdm, names: tuple[str, ...], fix: str) -> None:
    answer = cdm("tokenizer", "diff", *names)
    assert (answer.status, answer.out) == (2, "")
    assert len(answer.err.strip().splitlines()) == 1
    assert fix in answer.err


def test_diff_over_a_corpus_counts_by_class(cdm, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("Price: 12345 euros\n你好\n", encoding="utf-8")
    record = json.loads(cdm("tokenizer", "diff", "llama3", "qwen2", "--corpus", file, "--json").out)["corpus"]
    assert record["classes"]["CJK"]["bytes"] == 6
    # llama3 cuts digits by threes, qwen2 one by one
    assert record["classes"]["digits"]["kinds"]["1-n"] == 2
    out = cdm("tokenizer", "diff", "llama3", "qwen2", "--corpus", file).out
    assert "boundaries agree" in out


def test_list_shows_what_is_here(cdm) -> None:
    cdm("models", "fetch", "gpt2")
    record = {each["alias"]: each for each in json.loads(cdm("tokenizer", "list", "--json").out)}
    assert record["gpt2"]["size"] == 50257
    assert record["gpt2"]["family"] == "byte-level BPE"
