"""Kinds of text to train and to measure on: those that every Python brings along, the sample, or a JSONL file."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.errors import BadOption, FileProblem, UnknownName
from cdm_toolkit.kd.rows import Row

Split = Literal["train", "heldout"]

LEAST, MOST = 200, 500
"""Bytes of a piece."""
HELD_OUT = 4
"""One document of so many is held out."""
NOT_BY_CHANCE = 60
"""Characters of a paragraph that two documents have from one another."""
_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "encodings",
    "pydoc_data",
}
"""Folders of the standard library with no code that a person wrote to be read."""
_PARAGRAPH = re.compile(r"^[^\n]*\S[^\n]*(?:\n[^\n]*\S[^\n]*)*", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Document:
    """What pieces are cut from; a document is trained on or held out as a whole."""

    name: str
    texts: Callable[[], Sequence[str]]


def text_rows(path: str, *, rows: int | None = None, split: Split = "train") -> list[Row]:
    """Read the first `rows` of a kind of text, all without it; they are numbered from 1.

    `python:code`, `python:docstrings`, `python:manual` and `python:headers` are ASCII pieces of 200 to 500 bytes,
    without a prompt, of what the running Python brings along: the sources of its standard library, the docstrings in
    these, its manual's topics, its C headers. A quarter of the files (topics) is held out, the same of code and
    docstrings, and of their pieces those that share a paragraph with the others are left out. The order is fixed: files
    in an order that their names' hashes give, a piece of each, then a second, and so on. Anything else is read as
    `read_rows` does. Raises UnknownName, BadOption for more rows than there are and for the held-out part of what has
    none, FileProblem where this Python lacks such files, and as `read_rows`.
    """
    if path.startswith("python:"):
        read = [Row(number, "", piece) for number, piece in enumerate(_pieces_of(path, split)[:rows], 1)]
    elif split != "train":
        raise BadOption("split", split, f"it with one of {', '.join(KINDS)}: {path} is read as it is")
    else:
        read = read_rows(path)[:rows]
    if rows is not None and len(read) < rows:
        purpose = " to hold out" if split == "heldout" else ""
        raise BadOption("rows", rows, f"at most {len(read)}: {path} has no more{purpose}")
    return read


@cache
def _pieces_of(path: str, split: Split) -> tuple[str, ...]:
    """Take pieces of a split's documents in rounds, one of each at a time; no piece comes twice."""
    if path not in KINDS:
        raise UnknownName("kind of text", path, tuple(KINDS))
    parts: dict[Split, list[Document]] = {"train": [], "heldout": []}
    for document in sorted(KINDS[path](), key=lambda document: _hash(document.name)):
        parts["heldout" if _is_held_out(document) else "train"].append(document)
    elsewhere = parts["train"] if split == "heldout" else []
    passed = {part for document in elsewhere for text in document.texts() for part in _long_paragraphs(text)}
    rounds = chain.from_iterable(zip_longest(*map(_shuffled, parts[split])))
    pieces = dict.fromkeys(piece for piece in rounds if piece is not None)
    return tuple(piece for piece in pieces if passed.isdisjoint(_long_paragraphs(piece)))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_held_out(document: Document) -> bool:
    return _hash(document.name)[0] % HELD_OUT == 0


def _long_paragraphs(text: str) -> Iterator[str]:
    """Give the paragraphs that are too long to recur by chance; how far they are indented does not matter."""
    for found in _PARAGRAPH.finditer(text):
        paragraph = " ".join(found.group().split())
        if len(paragraph) >= NOT_BY_CHANCE:
            yield paragraph


def _shuffled(document: Document) -> Iterator[str]:
    """Cut a document; its pieces come in an order that they themselves give."""
    pieces = [piece for text in document.texts() for piece in cut_at_blank_lines(text)]
    yield from sorted((piece for piece in pieces if piece.isascii()), key=_hash)


def cut_at_blank_lines(text: str, *, least: int = LEAST, most: int = MOST) -> Iterator[str]:
    """Cut a text into stretches of whole paragraphs, `least` to `most` bytes each; what fits into none is left out.

    >>> list(cut_at_blank_lines("one\\n\\ntwo\\n\\nthree is long\\n\\nfour", least=5, most=9))
    ['one\\n\\ntwo']
    """
    begin: int | None = None
    end = 0
    for paragraph in (*_PARAGRAPH.finditer(text), None):
        too_long = paragraph is None or len(text[begin : paragraph.end()].encode()) > most
        if begin is not None and too_long:
            if len(text[begin:end].encode()) >= least:
                yield text[begin:end]
            begin = None
        if paragraph is not None:
            if begin is None and len(paragraph.group().encode()) <= most:
                begin = paragraph.start()
            end = paragraph.end()


# The kinds


def _sources() -> list[tuple[str, Path]]:
    """Find the standard library's files that a person would read, by the name within it."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = list[tuple[str, Path]]()
    for inner, folders, files in os.walk(folder):
        folders[:] = set(folders) - _LEFT_OUT
        names = (Path(inner, file).relative_to(folder) for file in files if file.endswith(".py"))
        found += [
            (name.as_posix(), folder / name)
            for name in names
            if not re.match(r"_sysconfigdata|config-", str(name))
        ]
    if not found:
        fix = "take another kind of text, or a Python with them"
        raise FileProblem(folder, "it has no Python sources", fix)
    return found


def _headers() -> list[tuple[str, Path]]:
    folder = Path(sysconfig.get_path("include"))
    found = [(file.relative_to(folder).as_posix(), file) for file in sorted(folder.rglob("*.h"))]
    if not found:
        fix = "install Python's headers, such as the package python3-dev, or take another kind of text"
        raise FileProblem(folder, "there are no C headers of this Python", fix)
    return found


def _topics() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        folder = Path(sysconfig.get_path("stdlib")) / "pydoc_data"
        fix = "install the whole standard library, or take another kind of text"
        raise FileProblem(folder, "this Python has no manual", fix) from None
    return [Document(name, partial(list, (text,))) for name, text in topics.items()]


def _documents(files: Iterable[tuple[str, Path]], read: Callable[[Path], Sequence[str]]) -> list[Document]:
    return [Document(name, partial(read, file)) for name, file in files]


def _read(file: Path) -> str:
    """Read a file; what is not UTF-8 becomes a mark that is not ASCII, and its piece is left out."""
    try:
        return file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError as error:
        raise FileProblem(file, f"it cannot be read ({error.strerror})") from None


def _whole(file: Path) -> list[str]:
    return [_read(file)]


@cache
def _docstrings(file: Path) -> Sequence[str]:
    with warnings.catch_warnings(action="ignore"):  # of odd escapes
        try:
            tree = ast.parse(_read(file))
        except SyntaxError:  # such as files that a distribution keeps for another Python
            return ()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds)]
    return tuple(inspect.cleandoc(text) for text in found if text)


KINDS: Mapping[str, Callable[[], list[Document]]] = {
    "python:code": lambda: _documents(_sources(), _whole),
    "python:docstrings": lambda: _documents(_sources(), _docstrings),
    "python:manual": _topics,
    "python:headers": lambda: _documents(_headers(), _whole),
}
"""Kinds of text that come from the running Python, and the documents of each."""
