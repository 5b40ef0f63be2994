"""Which texts a set of DistillKit has: packed or not, plain or chats, as real tokenizers write them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdm_toolkit.errors import FileProblem, MissingExtra, SourceNotFound
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.integrations.distillkit import DistillKitSet, IdRows, SetFiles, next_logprobs
from cdm_toolkit.kd.aligned_rows import align_groups
from cdm_toolkit.kd.rows import Row, row_of
from cdm_toolkit.kd.tokenized_rows import TokenizerSide, tokenize_rows, tokenizer_side

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi user"},
    {"role": "assistant", "content": "Hello, assistant here."},
    {"role": "user", "content": "How much is 2 + 2?"},
    {"role": "assistant", "content": "It is 4. 🍎"},
]


@cache
def side(name: str) -> TokenizerSide:
    try:
        loaded = load_tokenizer(name)
    except SourceNotFound as error:
        pytest.skip(str(error))
    return tokenizer_side(loaded.tokenizer, loaded.view)


def table(records: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(records).with_format("arrow")


def rows_of(name: str, *ids: list[int], **columns: Any) -> list[Row]:
    records = [
        {"input_ids": each, **{key: values[nth] for key, values in columns.items()}}
        for nth, each in enumerate(ids)
    ]
    return list(IdRows("a set", table(records), side(name).view))


def encoded(name: str, text: str) -> list[int]:
    return [int(i) for i in side(name).view.encode(text).ids]


@pytest.mark.parametrize("name", ["qwen2", "llama3", "mistral", "gpt2"])
def test_texts_that_were_packed_are_rows_of_their_own(name: str) -> None:
    """DistillKit numbers them in `attention_mask`, and leaves out the last token of each."""
    texts = [encoded(name, text) for text in ("One two three.", "Four", "Five six")]
    numbers = [n for n, text in enumerate(texts, 1) for _ in text]
    packed = [i for text in texts for i in text]
    found = rows_of(name, packed, packed[: len(texts[0])], attention_mask=[numbers, numbers[: len(texts[0])]])
    assert [row.number for row in found] == [1, 2, 3, 4]
    assert [row.text for row in found] == ["One two three.", "Four", "Five six", "One two three."]
    assert not any(row.ended for row in found)


def test_padding_is_no_row() -> None:
    ids = encoded("qwen2", "One two")
    found = rows_of("qwen2", [*ids, 5, 6], attention_mask=[[1] * len(ids) + [0, 0]])
    assert [row.text for row in found] == ["One two"]


@pytest.mark.parametrize("name", ["llama3", "mistral", "gpt2"])
def test_special_tokens_that_end_or_begin_a_text_part_it(name: str) -> None:
    of = side(name)
    texts = ["One two three.", "Four", "Five"]
    ids = [int(i) for text in texts for i in of.framed(of.view.encode(text).ids, ended=True)]
    found = rows_of(name, ids)
    assert [row.text for row in found] == texts
    assert all(row.ended for row in found)
    for row, text in zip(found, texts, strict=True):
        assert row.given is not None
        assert list(row.given.ids) == of.framed(of.view.encode(text).ids, ended=True).tolist()


def test_a_record_whose_texts_are_numbered_has_no_others() -> None:
    eos = side("gpt2").eos
    ids = [*encoded("gpt2", "One"), eos, *encoded("gpt2", " two"), *encoded("gpt2", "Three")]
    found = rows_of("gpt2", ids, attention_mask=[[1, 1, 1, 2]])
    assert [row.text for row in found] == ["One two", "Three"]


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "llama3"])
@pytest.mark.parametrize("other", ["smollm2", "qwen2"])
def test_chats_are_told_apart_by_their_markers(name: str, other: str) -> None:
    """The other side reads the messages through its own template; groups are those of the messages themselves."""
    given, read = side(name), side(other)
    if given.chat is None or read.chat is None:
        pytest.skip("no chat templates here")
    plain = row_of(1, {"messages": CHAT})
    own = tokenize_rows(given, [plain], "chat")[0]
    text = given.chat.render(CHAT).text
    (row,) = rows_of(name, encoded(name, text))
    assert [(one.role, one.content) for one in row.messages][-4:] == [
        (one["role"], one["content"]) for one in CHAT[-4:]
    ]
    assert row.learned[-1] == len(row.messages) - 1
    t, s = (tokenize_rows(each, [row], "chat")[0] for each in (given, read))
    assert t.ids.tolist() == own.ids.tolist()
    assert t.turns.tolist() == own.turns.tolist()
    wanted = align_groups(own, tokenize_rows(read, [plain], "chat")[0])
    found = align_groups(t, s)
    if len(row.messages) == len(CHAT):  # some templates write more into the system's message
        assert np.array_equal(found, wanted)
    assert np.array_equal(found[:, :2], wanted[:, :2])


def test_markers_of_deepseek() -> None:
    of = side("deepseek")
    names = {token.content: token.id for token in of.view.special.values()}
    user, assistant, eos = (
        names[each] for each in ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
    )
    ids = [of.start, *encoded("deepseek", "Be short."), user, *encoded("deepseek", "Hi"), assistant]
    ids += [*encoded("deepseek", "\u3000Hello there "), eos, user, *encoded("deepseek", "And?"), assistant]
    ids += [*encoded("deepseek", "Bye"), eos]
    (row,) = rows_of("deepseek", ids)
    assert [tuple(message[:2]) for message in row.messages] == [
        ("system", "Be short."),
        ("user", "Hi"),
        ("assistant", "Hello there"),
        ("user", "And?"),
        ("assistant", "Bye"),
    ]
    assert row.learned == (2, 4)
    assert row.ended
    (chat,) = tokenize_rows(of, [row], "chat")
    assert [body.spans.text_bytes for body in chat.bodies] == [b"Hello there", b"Bye"]
    assert [int(chat.ids[body.end]) for body in chat.bodies if body.end is not None] == [eos, eos]


def test_labels_choose_the_answers() -> None:
    of = side("qwen2")
    if of.chat is None:
        pytest.skip("no chat template here")
    ids = encoded("qwen2", of.chat.render(CHAT).text)
    plain = tokenize_rows(of, [row_of(1, {"messages": CHAT})], "chat")[0]
    labels = np.full(len(ids), -100)
    first, end = plain.turns[1]
    labels[first:end] = np.array(ids)[first:end]
    (row,) = rows_of("qwen2", ids, labels=[labels.tolist()])
    assert row.learned == (len(row.messages) - 1,)
    (nothing,) = rows_of("qwen2", ids, labels=[[-100] * len(ids)])
    assert nothing.completion == ""


def test_a_chat_that_was_cut_teaches_no_end() -> None:
    of = side("qwen2")
    if of.chat is None:
        pytest.skip("no chat template here")
    ids = encoded("qwen2", of.chat.render(CHAT).text)
    cut = ids[: tokenize_rows(of, [row_of(1, {"messages": CHAT})], "chat")[0].turns[1, 1] - 3]
    (row,) = rows_of("qwen2", cut)
    assert not row.ended
    assert row.completion.startswith("It is 4")
    assert tokenize_rows(of, [row], "chat")[0].bodies[1].end is None


def test_a_token_that_is_no_candidate_has_the_most_that_is_left() -> None:
    ids = np.array([[3, 1], [3, 1], [3, 1]], np.int32)
    logprobs = np.log(np.array([[0.6, 0.3], [0.6, 0.1], [0.9, 0.08]], np.float32))
    found = next_logprobs(ids, logprobs, np.array([1, 7, 7], np.int32))
    assert np.allclose(np.exp(found), [0.3, 0.1, 0.02], atol=1e-6)


def test_files_are_read_in_the_order_of_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    view = side("gpt2").view
    for nth in (10, 2, 0):
        ids = [encoded("gpt2", f"number {nth}")]
        values = {"token_ids": [[[1, 2]] * len(ids[0])], "top_values": [[[-0.5, -3.0]] * len(ids[0])]}
        parquet.write_table(pa.table({"input_ids": ids, **values}), folder / f"data_{nth}.parquet")
    for path in (str(folder), f"{folder}/*.parquet"):
        found = DistillKitSet(SetFiles(path), view)
        assert [row.text for row in found.rows] == ["number 0", "number 2", "number 10"]
    SetFiles(str(folder)).table().save_to_disk(str(tmp_path / "saved"))
    saved = DistillKitSet(SetFiles(str(tmp_path / "saved")), view)
    assert [row.text for row in saved.rows] == ["number 0", "number 2", "number 10"]
    assert np.array_equal(saved.row(3).logprobs, found.row(3).logprobs)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="reading a set of log-probabilities needs datasets"):
        SetFiles(str(tmp_path)).table()


def test_what_is_no_parquet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data_0.parquet").write_text("no table")
    with pytest.raises(FileProblem, match="it cannot be opened") as caught:
        SetFiles(str(tmp_path)).table()
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
