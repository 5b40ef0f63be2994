"""Rows of JSONL: the four shapes, and every way to get them wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.errors import BadRow, FileProblem
from cdm_toolkit.kd.rows import Message, Row


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_four_shapes(rows_file: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]
    each = (
        {"prompt": "p", "completion": "c", "text": "not looked at"},
        {"question": "q", "answer": "a"},
        {"messages": messages},
        {"text": "t"},
    )
    found = [row for one in each for row in read_rows(write(rows_file, one))]
    assert [(row.prompt, row.completion) for row in found] == [
        ("p", "c"),
        ("q", "a"),
        ("Be brief.\n1 + 1?", "2"),
        ("", "t"),
    ]


def test_rows_as_chats(rows_file: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief.", "weight": 3},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]
    pair = {"question": "q", "answer": "a"}
    (chat,) = read_rows(write(rows_file, {"messages": messages}))
    (asked,) = read_rows(write(rows_file, pair))
    (text,) = read_rows(write(rows_file, {"text": "t"}))
    assert chat.messages[0] == Message("system", "Be brief.")
    assert chat.chat == [{"role": "system", "content": "Be brief."}, *messages[1:]]
    assert asked.chat == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert text.chat == []
    assert len({chat, asked, text, Row(1, "q", "a")}) == 3


def test_text_and_where_the_completion_starts_in_bytes(rows_file: Path) -> None:
    (first,) = read_rows(write(rows_file, {"prompt": "naïve", "completion": "ö!"}))
    (second,) = read_rows(write(rows_file, {"text": "t"}))
    assert (first.text, first.completion_start) == ("naïve\nö!", len("naïve\n".encode()))
    assert (second.text, second.completion_start) == ("t", 0)


def test_numbers_count_lines_from_1(rows_file: Path) -> None:
    rows_file.write_text('\ufeff{"text": "a"}\r\n\n{"text": "b"}\n', encoding="utf-8")
    assert [row.number for row in read_rows(rows_file)] == [1, 3]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "p"}', "it has prompt"),
        ("{}", "it has no field"),
        ('{"text": "a"', "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"text": 5}', "text is int, not a string"),
        ('{"question": "q", "answer": null}', "answer is NoneType"),
        ('{"text": "\\ud800"}', "lone surrogate \\ud800"),
        ('{"messages": "hi"}', "not a list of objects"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "no message is an answer of the assistant"),
        ('{"messages": [{"role": "assistant"}]}', "message 1 has no content"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_rows_are_named(rows_file: Path, line: str, problem: str) -> None:
    rows_file.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(BadRow, match="row 2") as caught:
        read_rows(rows_file)
    assert problem in str(caught.value)


def test_missing_empty_binary_and_folder(tmp_path: Path, rows_file: Path) -> None:
    with pytest.raises(FileProblem, match="no such file"):
        read_rows(rows_file)
    rows_file.write_text("\n", encoding="utf-8")
    with pytest.raises(FileProblem, match="no rows"):
        read_rows(rows_file)
    rows_file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileProblem, match="not UTF-8"):
        read_rows(rows_file)
    with pytest.raises(FileProblem, match="folder"):
        read_rows(tmp_path)


def test_a_sample_of_the_package_is_named_like_a_file() -> None:
    from cdm_toolkit.errors import UnknownName
    from cdm_toolkit.samples import sample_path

    assert read_rows("sample:heldout") == read_rows(sample_path("heldout"))
    with pytest.raises(UnknownName, match="did you mean train"):
        read_rows("sample:tain")
