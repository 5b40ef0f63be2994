"""Read and write training rows as JSONL."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cdm_toolkit.artifacts.atomic import atomic_write
from cdm_toolkit.errors import BadOption, BadRow, FileProblem, UnknownName
from cdm_toolkit.kd.rows import FIELDS, Row, RowFault, chat_of
from cdm_toolkit.samples import FILES, sample_path


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL, whole or not at all; a chat is written as a prompt and its completion."""
    with atomic_write(path) as stream:
        for row in rows:
            fields = {"prompt": row.prompt, "completion": row.completion}
            stream.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")


def read_objects(path: Path, fields: str = FIELDS) -> list[tuple[int, Any]]:
    """Read the JSON value of each line of a file, which may be gzipped, with its number from 1; blank ones are skipped.

    `fields` names those that rows must have, for messages. Raises FileProblem and BadRow.
    """
    with read_problems(path, "give a JSONL file"):
        found = list(values(path, fields))
    if not found:
        raise FileProblem(path, "it has no rows", f"give a JSONL file whose rows have {fields}")
    return found


def values(path: Path, fields: str = FIELDS) -> Iterator[tuple[int, Any]]:
    """Give the JSON value of each line with its number; blank lines are skipped, and counted. Raises BadRow."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"it is not JSON ({error.msg}, column {error.colno})"
                raise BadRow(path, number, problem, "write one JSON object a line") from None
            except RecursionError:
                raise BadRow(path, number, "it is nested too deeply", f"give each row {fields}") from None


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a file of UTF-8 text, with or without a mark at its beginning, which may be gzipped."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    file: TextIO = opened(path, "rt", encoding="utf-8-sig", newline=newline)
    return file


def read_text(path: Path) -> str:
    """Read a text file. Raises FileProblem."""
    with read_problems(path, "save it as UTF-8"):
        return path.read_text(encoding="utf-8")


@contextmanager
def read_problems(path: Path, fix: str) -> Iterator[None]:
    """Turn what the file system says into FileProblem."""
    try:
        yield
    except FileNotFoundError:
        raise FileProblem(path, "there is no such file") from None
    except IsADirectoryError:
        raise FileProblem(path, "it is a folder", fix) from None
    except UnicodeDecodeError as error:
        raise FileProblem(path, f"it is not UTF-8 text (byte {error.start})", fix) from None
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise FileProblem(path, f"it cannot be read ({why})", fix) from None


def data_file(path: str | Path) -> Path:
    """Give the file of a path; `sample:train` and the like are the package's. Raises UnknownName."""
    scheme, _, name = str(path).partition(":")
    if scheme != "sample":
        return Path(path)
    if name not in FILES:
        raise UnknownName("sample", name, tuple(FILES))
    return sample_path(name)


def parse_messages(text: str) -> list[dict[str, Any]]:
    """Read a chat from JSON: a list of messages with role and content. Raises BadOption."""
    try:
        messages = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadOption("the chat", text, f"messages as JSON ({error.msg}, column {error.colno})") from None
    try:
        return chat_of(messages)
    except RowFault as error:
        problem, fix = error.args
        raise BadOption("the chat", text, f"messages as JSON: {problem}; {fix}") from None


def read_messages(path: str | Path) -> list[list[dict[str, Any]]]:
    """Read the chats of a JSONL file whose rows have messages. Raises as `read_rows`."""
    chats = []
    for number, fields in read_objects(Path(path)):
        if not isinstance(fields, dict) or "messages" not in fields:
            raise BadRow(
                path, number, "it has no messages", 'give {"messages": [{"role": …, "content": …}, …]}'
            )
        try:
            chats.append(chat_of(fields["messages"]))
        except RowFault as error:
            raise BadRow(path, number, *error.args) from None
    return chats
