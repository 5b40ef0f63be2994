"""Training rows from a JSONL file: a prompt and its completion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cdm_toolkit.artifacts.atomic import atomic_write
from cdm_toolkit.errors import BadOption, BadRow, FileProblem, UnknownName
from cdm_toolkit.samples import SPLITS, sample_path

PAIRS = (("prompt", "completion"), ("question", "answer"))
FIELDS = "prompt and completion, question and answer, messages, or text"


class Message(NamedTuple):
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, which is not trained on, and a completion, which is; `number` counts from 1 in the file.

    Without a chat template both models read `text`: the prompt, a line feed, the completion; the completion
    alone where there is no prompt. With it, each reads its own rendering of `chat`.
    """

    number: int
    prompt: str
    completion: str
    messages: tuple[Message, ...] = ()
    """Those of a row that has messages; the last is the completion."""

    @property
    def chat(self) -> list[dict[str, str]]:
        """The row as messages; empty where it is a text without a prompt, which is no conversation."""
        if self.messages:
            return [message._asdict() for message in self.messages]
        if not self.prompt:
            return []
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.completion},
        ]

    @property
    def text(self) -> str:
        return f"{self.prompt}\n{self.completion}" if self.prompt else self.completion

    @property
    def completion_start(self) -> int:
        """Where the completion begins, in bytes of `text`."""
        return len(self.text.encode()) - len(self.completion.encode())


class _RowError(Exception):
    """What is wrong with a row, and the fix."""


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL, whole or not at all; a chat is written as a prompt and its completion."""
    with atomic_write(path) as stream:
        for row in rows:
            fields = {"prompt": row.prompt, "completion": row.completion}
            stream.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise _RowError(f"{name} is {type(value).__name__}, not a string", f"make {name} a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise _RowError(
            f"{name} has a lone surrogate {half}", "write the whole character, or drop it"
        ) from None
    return value


def _messages(messages: Any) -> tuple[str, str, tuple[Message, ...]]:
    """Join the contents with line feeds; the last message, the assistant's, is the completion."""
    chat = _chat(messages)
    if chat[-1]["role"] != "assistant":
        raise _RowError(
            "the last message is not the assistant's", "end each conversation with the answer to learn"
        )
    *before, last = (message["content"] for message in chat)
    return "\n".join(before), last, tuple(Message(**message) for message in chat)


def _parts(fields: Any) -> tuple[str, str, tuple[Message, ...]]:
    if not isinstance(fields, dict):
        raise _RowError("it is not a JSON object", f"give each row {FIELDS}")
    for prompt, completion in PAIRS:
        if prompt in fields and completion in fields:
            return _string(fields, prompt), _string(fields, completion), ()
    if "messages" in fields:
        return _messages(fields["messages"])
    if "text" in fields:
        return "", _string(fields, "text"), ()
    has = ", ".join(map(str, fields)) or "no field"
    raise _RowError(f"it has {has}", f"give each row {FIELDS}")


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"it is not JSON ({error.msg}, column {error.colno})"
                raise BadRow(path, number, problem, "write one JSON object a line") from None
            except RecursionError:
                raise BadRow(path, number, "it is nested too deeply", f"give each row {FIELDS}") from None


def _read_objects(path: Path) -> list[tuple[int, Any]]:
    try:
        found = list(_lines(path))
    except FileNotFoundError:
        raise FileProblem(path, "there is no such file") from None
    except IsADirectoryError:
        raise FileProblem(path, "it is a folder", "give a JSONL file") from None
    except UnicodeDecodeError as error:
        raise FileProblem(path, f"it is not UTF-8 text (byte {error.start})", "give a JSONL file") from None
    except OSError as error:
        raise FileProblem(path, f"it cannot be read ({error.strerror})") from None
    if not found:
        raise FileProblem(path, "it has no rows", f"give a JSONL file whose rows have {FIELDS}")
    return found


def read_rows(path: str | Path) -> list[Row]:
    """Read all rows of a JSONL file; blank lines are skipped, and counted as lines.

    `sample:train` is a split of the word problems that come with the package. Raises FileProblem for a file that
    is missing, empty or not text, UnknownName for a sample that is not there, and BadRow for the first row that
    is not as it must be.
    """
    rows = []
    for number, fields in _read_objects(_file(path)):
        try:
            rows.append(Row(number, *_parts(fields)))
        except _RowError as error:
            raise BadRow(path, number, *error.args) from None
    return rows


def _file(path: str | Path) -> Path:
    scheme, _, split = str(path).partition(":")
    if scheme != "sample":
        return Path(path)
    if split not in SPLITS:
        raise UnknownName("sample", split, SPLITS)
    return sample_path(split)


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """Hash what rows say, and their numbers."""
    digest = hashlib.sha256()
    for row in rows:
        said = [row.number, row.prompt, row.completion, *map(list, row.messages)]
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()


def parse_messages(text: str) -> list[dict[str, str]]:
    """Read a chat from JSON: a list of messages with role and content. Raises BadOption."""
    try:
        messages = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadOption("the chat", text, f"messages as JSON ({error.msg}, column {error.colno})") from None
    try:
        return _chat(messages)
    except _RowError as error:
        problem, fix = error.args
        raise BadOption("the chat", text, f"messages as JSON: {problem}; {fix}") from None


def read_messages(path: str | Path) -> list[list[dict[str, str]]]:
    """Read the chats of a JSONL file whose rows have messages. Raises as `read_rows`."""
    chats = []
    for number, fields in _read_objects(Path(path)):
        if not isinstance(fields, dict) or "messages" not in fields:
            raise BadRow(
                path, number, "it has no messages", 'give {"messages": [{"role": …, "content": …}, …]}'
            )
        try:
            chats.append(_chat(fields["messages"]))
        except _RowError as error:
            raise BadRow(path, number, *error.args) from None
    return chats


def _chat(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _RowError("messages is not a list of objects", 'give [{"role": "user", "content": "…"}, …]')
    if not messages:
        raise _RowError("messages is empty", 'give [{"role": "user", "content": "…"}, …]')
    for nth, message in enumerate(messages, 1):
        for field in ("role", "content"):
            if field not in message:
                raise _RowError(f"message {nth} has no {field}", "give each message a role and a content")
    return [{field: _string(message, field) for field in ("role", "content")} for message in messages]
