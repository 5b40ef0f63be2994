"""Kinds of text to train and to measure on: those that every Python brings along, the sample, or a JSONL file."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
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
        found = list(islice(_pieces_of(path, split), rows))
        read = [Row(number, "", piece) for number, piece in enumerate(found, 1)]
    elif split != "train":
        kinds = ", ".join(KINDS)
        raise BadOption("split", split, f"it with one of {kinds}: {path} is read as it is")
    else:
        read = read_rows(path)[:rows]
    if rows is not None and len(read) < rows:
        raise BadOption("rows", rows, f"at most {len(read)}: {path} has no more{_PURPOSE[split]}")
    return read


_PURPOSE: Mapping[Split, str] = {"train": "", "heldout": " to hold out"}


def _pieces_of(path: str, split: Split) -> Iterator[str]:
    """Go round the documents of a split, a piece of each at a time; no piece comes twice."""
    if path not in KINDS:
        raise UnknownName("kind of text", path, tuple(KINDS))
    documents = sorted(KINDS[path](), key=lambda document: _hash(document.name))
    mine = [document for document in documents if _is_held_out(document) == (split == "heldout")]
    seen: set[str] = set()
    elsewhere: set[str] = set()
    if split == "heldout":
        elsewhere = {p for document in documents if not _is_held_out(document) for p in _paragraphs(document)}
    turns = [_shuffled(document) for document in mine]
    while turns:
        for pieces in tuple(turns):
            piece = next(pieces, None)
            if piece is None:
                turns.remove(pieces)
            elif piece not in seen and elsewhere.isdisjoint(_long_paragraphs(piece)):
                seen.add(piece)
                yield piece


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_held_out(document: Document) -> bool:
    return _hash(document.name)[0] % HELD_OUT == 0


def _paragraphs(document: Document) -> Iterator[str]:
    for text in document.texts():
        yield from _long_paragraphs(text)


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
    for paragraph in _PARAGRAPH.finditer(text):
        if begin is not None and len(text[begin : paragraph.end()].encode()) > most:
            yield from _long_enough(text[begin:end], least)
            begin = None
        if begin is None and len(paragraph.group().encode()) <= most:
            begin = paragraph.start()
        end = paragraph.end()
    if begin is not None:
        yield from _long_enough(text[begin:end], least)


def _long_enough(piece: str, least: int) -> Iterator[str]:
    if len(piece.encode()) >= least:
        yield piece


# The kinds


def _sources() -> Iterator[tuple[str, Path]]:
    """Find the standard library's files that a person would read, by the name within it."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = 0
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder)
        if _LEFT_OUT.isdisjoint(name.parts) and not re.match(r"_sysconfigdata|config-", str(name)):
            found += 1
            yield name.as_posix(), file
    if not found:
        raise FileProblem(
            folder, "it has no Python sources", "take another kind of text, or a Python with them"
        )


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


def _code_documents() -> list[Document]:
    return [Document(name, partial(_whole, file)) for name, file in _sources()]


def _docstring_documents() -> list[Document]:
    return [Document(name, partial(_docstrings, file)) for name, file in _sources()]


def _manual_documents() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        folder = Path(sysconfig.get_path("stdlib")) / "pydoc_data"
        fix = "install the whole standard library, or take another kind of text"
        raise FileProblem(folder, "this Python has no manual", fix) from None
    return [Document(name, partial(list, (text,))) for name, text in topics.items()]


def _header_documents() -> list[Document]:
    folder = Path(sysconfig.get_path("include"))
    files = sorted(folder.rglob("*.h"))
    if not files:
        fix = "install Python's headers, such as the package python3-dev, or take another kind of text"
        raise FileProblem(folder, "there are no C headers of this Python", fix)
    return [Document(file.relative_to(folder).as_posix(), partial(_whole, file)) for file in files]


KINDS: Mapping[str, Callable[[], list[Document]]] = {
    "python:code": _code_documents,
    "python:docstrings": _docstring_documents,
    "python:manual": _manual_documents,
    "python:headers": _header_documents,
}
"""Kinds of text that come from the running Python, and the documents of each."""
