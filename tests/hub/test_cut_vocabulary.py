"""Vocabularies that are cut to their first ids."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cdm_toolkit.errors import BadOption, FileProblem
from cdm_toolkit.hub.cut_vocabulary import cut, load_cut
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.samples import sample_path
from cdm_toolkit.tokdiff.token_bytes import gpt2_alphabet
from cdm_toolkit.tokdiff.view import make_view

BYTE_LEVEL = ("gpt2", "smollm2", "qwen2", "llama3")
ENTRIES = 3000


@pytest.fixture(scope="module", params=BYTE_LEVEL)
def whole(request: pytest.FixtureRequest, loaded: Callable[[str], Loaded]) -> Loaded:
    return loaded(request.param)


@pytest.fixture(scope="module")
def smaller(whole: Loaded) -> Loaded:
    return cut(whole, ENTRIES)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = sample_path("train").read_text(encoding="utf-8").splitlines()[:40]
    code = Path(json.__file__).read_text(encoding="utf-8")
    odd = ["", " ", "größe 漢字 🙂", "a\r\n\tb  c", "<|endoftext|> in a text", "0123456789"]
    return [*lines, code, *odd]


def _description(loaded: Loaded) -> dict[str, Any]:
    return dict(json.loads(loaded.tokenizer.backend_tokenizer.to_str()))


def _plain(loaded: Loaded) -> list[int]:
    """List the ids that are no added token, in order."""
    added = {token["id"] for token in _description(loaded)["added_tokens"]}
    return [i for i in range(loaded.view.vocab_size) if i not in added]


def test_kept_ids_stand_for_the_same_bytes_in_the_same_order(whole: Loaded, smaller: Loaded) -> None:
    before, after = _plain(whole), _plain(smaller)
    assert smaller.view.vocab_size == len(smaller.tokenizer) == ENTRIES
    assert len(after) == ENTRIES - (whole.view.vocab_size - len(before))
    assert after == list(range(len(after)))
    old = [whole.view.token_bytes[i] for i in before[: len(after)]]
    assert [smaller.view.token_bytes[i] for i in after] == old
    assert smaller.view.dropped_bytes == whole.view.dropped_bytes


def test_added_tokens_are_kept_with_their_roles(whole: Loaded, smaller: Loaded) -> None:
    def roles(loaded: Loaded) -> dict[str, frozenset[str]]:
        return {token.content: token.roles for token in loaded.view.special.values()}

    assert roles(smaller) == roles(whole)
    assert smaller.tokenizer.special_tokens_map == whole.tokenizer.special_tokens_map
    assert smaller.tokenizer.chat_template == whole.tokenizer.chat_template
    for token in smaller.view.special.values():
        assert (
            smaller.tokenizer.convert_tokens_to_ids(token.content) == token.id >= ENTRIES - len(roles(whole))
        )


def test_texts_are_spelled_byte_for_byte(smaller: Loaded, texts: list[str]) -> None:
    for text, spans in zip(texts, smaller.view.encode_batch(texts), strict=True):
        assert b"".join(smaller.view.literals[i] for i in spans.ids) == text.encode()
        assert smaller.tokenizer(text, add_special_tokens=False)["input_ids"] == spans.ids.tolist()


def _by_hand(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge the pair of the lowest rank, wherever it stands, until no pair has one."""
    symbols = list(word)
    while found := min(
        (pair for pair in pairwise(symbols) if pair in ranks), key=ranks.__getitem__, default=None
    ):
        merged: list[str] = []
        for symbol in symbols:
            if merged and (merged[-1], symbol) == found:
                merged[-1] += symbol
            else:
                merged.append(symbol)
        symbols = merged
    return symbols


def _words(loaded: Loaded, text: str) -> Iterator[str]:
    yield from (word for word, _ in loaded.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))


def test_encoding_is_bpe_with_the_first_merges(loaded: Callable[[str], Loaded], texts: list[str]) -> None:
    """GPT-2: token 256 + n is the result of merge n, so that 3,000 entries are its first 2,743 merges."""
    whole = loaded("gpt2")
    merges = [tuple(pair) for pair in _description(whole)["model"]["merges"]][: ENTRIES - 256 - 1]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    smaller = cut(whole, ENTRIES)
    ids = whole.tokenizer.get_vocab()
    for text in texts:
        text = text.replace("<|endoftext|>", "")
        expected = [ids[symbol] for word in _words(whole, text) for symbol in _by_hand(word, ranks)]
        assert smaller.view.encode(text).ids.tolist() == expected


def test_encoding_of_a_rank_file_is_bpe_with_the_first_ranks(
    loaded: Callable[[str], Loaded], texts: list[str]
) -> None:
    """Qwen2: any two neighbours whose join is a token may merge, the lowest id first."""
    whole = loaded("qwen2")
    smaller = cut(whole, ENTRIES)
    byte = gpt2_alphabet()
    ids = {token: i for i, token in enumerate(smaller.view.token_bytes) if token is not None}
    for text in texts:
        text = text.replace("<|endoftext|>", "").replace("größe", "grosse")  # Qwen2 composes characters
        expected: list[int] = []
        for word in _words(whole, text):
            symbols = [bytes([byte[letter]]) for letter in word]
            while joins := [(ids[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]:
                _, at = min(joins)
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            expected += [ids[symbol] for symbol in symbols]
        assert smaller.view.encode(text).ids.tolist() == expected


def test_a_saved_one_is_the_same(smaller: Loaded, texts: list[str], tmp_path: Path) -> None:
    smaller.tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.view.fingerprint == smaller.view.fingerprint
    assert again.tokenizer.special_tokens_map == smaller.tokenizer.special_tokens_map
    for text in texts:
        assert again.tokenizer(text)["input_ids"] == smaller.tokenizer(text)["input_ids"]


def test_what_stands_around_a_text_has_new_ids(loaded: Callable[[str], Loaded]) -> None:
    whole = loaded("llama3")
    smaller = cut(whole, ENTRIES)
    first = smaller.tokenizer("text")["input_ids"][0]
    assert first == smaller.tokenizer.bos_token_id < ENTRIES
    assert smaller.tokenizer.convert_ids_to_tokens(first) == "<|begin_of_text|>"


def test_the_cut_names_itself_and_its_source(loaded: Callable[[str], Loaded]) -> None:
    whole = loaded("gpt2")
    smaller = cut(whole, ENTRIES)
    assert smaller.view.name == f"gpt2 cut to {ENTRIES}"
    assert smaller.view.fingerprint != whole.view.fingerprint
    assert smaller.source == whole.source


def test_all_entries_are_the_whole(loaded: Callable[[str], Loaded]) -> None:
    whole = loaded("gpt2")
    assert cut(whole, whole.view.vocab_size).view.fingerprint == whole.view.fingerprint


def test_the_fewest_entries_are_bytes(loaded: Callable[[str], Loaded]) -> None:
    bytes_only = cut(loaded("gpt2"), 257)
    assert len(bytes_only.view.encode("größe")) == len("größe".encode())


def test_loading_whole_or_cut(loaded: Callable[[str], Loaded]) -> None:
    whole = loaded("gpt2")
    assert load_cut(whole, None) is whole
    assert load_cut("gpt2", 300).view.fingerprint == load_cut(whole, 300).view.fingerprint


@pytest.mark.parametrize("entries", [-1, 0, 256, 50_258])
def test_too_few_or_too_many(loaded: Callable[[str], Loaded], entries: int) -> None:
    with pytest.raises(BadOption, match="257 to 50257 for gpt2"):
        cut(loaded("gpt2"), entries)


def test_another_kind_is_refused(loaded: Callable[[str], Loaded]) -> None:
    with pytest.raises(
        BadOption, match="byte-level BPE tokenizer, such as gpt2: mistral is SentencePiece BPE"
    ):
        cut(loaded("mistral"), ENTRIES)


def _of(vocab: Mapping[str, int], merges: list[tuple[str, str]]) -> Loaded:
    """Make a byte-level BPE tokenizer of three letters."""
    from tokenizers import decoders
    from tokenizers.models import BPE

    backend = Tokenizer(BPE(dict(vocab), merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    view = make_view("small", Tokenizer.from_str(backend.to_str()))
    return Loaded(view, fast, replace(load_tokenizer("gpt2").source, name="small"))


IN_ORDER = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
MERGES = [("a", "b"), ("ab", "c")]


def test_ids_in_the_order_of_merges() -> None:
    assert cut(_of(IN_ORDER, MERGES), 4).view.token_bytes == (b"a", b"b", b"c", b"ab")


@pytest.mark.parametrize(
    ("vocab", "entries", "lost"),
    [
        ({"a": 0, "b": 1, "c": 2, "abc": 3, "ab": 4}, 4, "abc"),  # a result before its part
        ({"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}, 3, "c"),  # a byte behind a merge
    ],
)
def test_ids_in_another_order_are_refused(vocab: dict[str, int], entries: int, lost: str) -> None:
    with pytest.raises(BadOption, match="not in the order of its merges") as raised:
        cut(_of(vocab, MERGES), entries)
    assert repr(lost) in str(raised.value)


def test_a_full_disk(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(FileProblem, match="No space left on device"):
        cut(loaded("gpt2"), ENTRIES)
