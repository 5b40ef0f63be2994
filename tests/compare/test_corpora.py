"""Kinds of text that a study can name."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.compare import corpora
from cdm_toolkit.compare.corpora import KINDS, LEAST, MOST, Split, cut_at_blank_lines, text_rows
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.errors import BadOption, FileProblem, UnknownName
from cdm_toolkit.kd.rows import Row

SPLITS: tuple[Split, ...] = ("train", "heldout")


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        text_rows(name, rows=1)
    except FileProblem as error:
        pytest.skip(str(error))
    return name


@cache
def _every(kind: str, split: Split) -> tuple[Row, ...]:
    return tuple(text_rows(kind, split=split))


def _completions(kind: str, split: Split) -> list[str]:
    return [row.completion for row in _every(kind, split)]


@pytest.mark.parametrize("split", SPLITS)
def test_pieces_are_texts_of_their_size(kind: str, split: Split) -> None:
    rows = _every(kind, split)
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert not any(row.prompt or row.messages for row in rows)
    for row in rows:
        assert row.completion.isascii()
        assert LEAST <= len(row.completion) <= MOST
        assert row.completion.strip()


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_rows_are_the_same_however_many_are_asked_for(kind: str, split: Split) -> None:
    every = list(_every(kind, split))
    assert text_rows(kind, rows=7, split=split) == every[:7]
    assert len({row.completion for row in every}) == len(every)


@pytest.mark.parametrize("split", SPLITS)
def test_more_rows_than_there_are(split: Split) -> None:
    every = text_rows("python:manual", split=split)
    assert text_rows("python:manual", rows=len(every), split=split) == every
    with pytest.raises(
        BadOption, match=f"`rows` is {len(every) + 1}; give at most {len(every)}: python:manual"
    ):
        text_rows("python:manual", rows=len(every) + 1, split=split)


def test_what_is_held_out_shares_no_paragraph_with_the_rest(kind: str) -> None:
    train, heldout = (_completions(kind, split) for split in SPLITS)

    def paragraphs(pieces: list[str]) -> set[str]:
        return {" ".join(part.split()) for piece in pieces for part in piece.split("\n\n")}

    shared = paragraphs(train) & paragraphs(heldout)
    assert max(map(len, shared), default=0) < corpora.NOT_BY_CHANCE
    assert len(train) > len(heldout) > 50


def test_each_row_comes_from_another_file() -> None:
    """The first pieces go round the files: none of them is there twice."""
    folder = Path(sysconfig.get_path("stdlib"))
    pieces = _completions("python:code", "train")[:30]
    files = {
        name: file.read_text(encoding="utf-8", errors="replace")
        for name, file in corpora._sources()
        if file.is_relative_to(folder)
    }
    holding = [{name for name, text in files.items() if piece in text} for piece in pieces]
    assert all(holding)
    assert len(set().union(*holding)) >= 30


def test_docstrings_are_docstrings() -> None:
    said = [
        textwrap.dedent(ast.get_docstring(node) or "")
        for _, file in corpora._sources()
        for node in ast.walk(ast.parse(corpora._read(file)))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    whole = "\0".join(said)
    for piece in _completions("python:docstrings", "heldout")[:20]:
        assert piece in whole
        assert not piece.startswith('"""')


def test_the_manual_is_split_by_topic() -> None:
    held_out = [text for name, text in topics.items() if corpora._is_held_out(corpora.Document(name, list))]
    pieces = _completions("python:manual", "heldout")
    assert all(any(piece in text for text in held_out) for piece in pieces)


@given(st.lists(st.sampled_from(["a line", "  indented", "", " ", "x" * 30, "é"]), max_size=40))
def test_pieces_are_stretches_of_the_text(lines: list[str]) -> None:
    text = "\n".join(lines)
    at = 0
    for piece in cut_at_blank_lines(text, least=10, most=40):
        assert 10 <= len(piece.encode()) <= 40
        begin = text.index(piece, at)
        at = begin + len(piece)
        assert begin == 0 or text[begin - 1] == "\n"
        assert at == len(text) or text[at] == "\n"


def test_pieces_end_at_blank_lines() -> None:
    text = (
        "def one():\n    return 1\n\n\ndef two():\n    x = 2\n\n    return x\n\n\n"
        + "y = 3\n" * 20
        + "\nz = 4\n"
    )
    assert list(cut_at_blank_lines(text, least=20, most=50)) == [
        "def one():\n    return 1\n\n\ndef two():\n    x = 2"
    ]
    assert list(cut_at_blank_lines(text, least=5, most=45)) == [
        "def one():\n    return 1",
        "def two():\n    x = 2\n\n    return x",
        "z = 4",
    ]


def test_other_paths_are_read_as_rows(tmp_path: Path) -> None:
    assert text_rows("sample:train", rows=5) == read_rows("sample:train")[:5]
    assert text_rows("sample:heldout") == read_rows("sample:heldout")
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"question": "1 + 1", "answer": "2"}\n{"question": "", "answer": "three"}\n', encoding="utf-8"
    )
    assert [row.text for row in text_rows(str(file))] == ["1 + 1\n2", "three"]
    with pytest.raises(BadOption, match="`rows` is 3; give at most 2"):
        text_rows(str(file), rows=3)


def test_a_file_has_no_part_to_hold_out() -> None:
    with pytest.raises(BadOption, match="`split` is 'heldout'; give it with one of python:code"):
        text_rows("sample:train", split="heldout")


def test_an_unknown_kind() -> None:
    with pytest.raises(UnknownName, match="did you mean python:docstrings"):
        text_rows("python:docstring")
    with pytest.raises(UnknownName, match="sample"):
        text_rows("sample:dev")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("python:headers", "no C headers.*python3-dev"), ("python:code", "no Python sources")],
)
def test_a_python_without_its_files(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    corpora._pieces_of.cache_clear()
    with pytest.raises(FileProblem, match=words):
        text_rows(kind, rows=1)
