"""A training row: a prompt, which is read, and a completion, which is learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

FIELDS = (
    "prompt and completion, question and answer, messages, conversations, instruction and output, or text"
)


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


class RowFault(Exception):
    """What is wrong with a row, and the fix."""


def row_of(number: int, fields: Any, shape: tuple[str, ...] | None = None) -> Row:
    """Make a row of a mapping, such as a line of a file. RowFault where a field is missing or no text.

    `shape` is that of the fields, where it is known.
    """
    names = shape or shape_of(fields)
    return Row(number, *_READERS[names](fields, *names))


def chat_of(messages: Any) -> list[dict[str, str]]:
    """Check a list of messages, each with a role and a content. RowFault."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowFault("messages is not a list of objects", 'give [{"role": "user", "content": "…"}, …]')
    if not messages:
        raise RowFault("messages is empty", 'give [{"role": "user", "content": "…"}, …]')
    for nth, message in enumerate(messages, 1):
        for field in ("role", "content"):
            if field not in message:
                raise RowFault(f"message {nth} has no {field}", "give each message a role and a content")
    return [{field: _string(message, field) for field in ("role", "content")} for message in messages]


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise RowFault(f"{name} is {type(value).__name__}, not a string", f"make {name} a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise RowFault(
            f"{name} has a lone surrogate {half}", "write the whole character, or drop it"
        ) from None
    return value


ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of ShareGPT and its kin for the roles that chat templates know."""

Parts = tuple[str, str, tuple[Message, ...]]
"""Prompt, completion, and the messages of a chat."""


def shape_of(fields: Any) -> tuple[str, ...]:
    """Name the fields that say what a row is, such as prompt and completion. RowFault where there are none."""
    if not isinstance(fields, Mapping):
        raise RowFault("it is not a JSON object", f"give each row {FIELDS}")
    for names in _READERS:
        if all(name in fields for name in names):
            return names
    has = ", ".join(map(str, fields)) or "no field"
    raise RowFault(f"it has {has}", f"give each row {FIELDS}, or name its columns with `columns`")


def _pair(fields: Mapping[str, Any], prompt: str, completion: str) -> Parts:
    """Read two texts, or two lists of messages as TRL writes them: the prompt's, then the completion's."""
    both = fields[prompt], fields[completion]
    if all(isinstance(each, list) for each in both):
        return _chat([message for each in both for message in each])
    return _string(fields, prompt), _string(fields, completion), ()


def _messages(fields: Mapping[str, Any], name: str) -> Parts:
    return _chat(fields[name])


def _chat(messages: Any) -> Parts:
    """Join the contents with line feeds; the last message, the assistant's, is the completion."""
    chat = chat_of(messages)
    if chat[-1]["role"] != "assistant":
        raise RowFault(
            "the last message is not the assistant's", "end each conversation with the answer to learn"
        )
    *before, last = (message["content"] for message in chat)
    return "\n".join(before), last, tuple(Message(**message) for message in chat)


def _conversation(fields: Mapping[str, Any], name: str) -> Parts:
    """Read the turns of ShareGPT, each with `from` and `value`."""
    turns = fields[name]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowFault("conversations is not a list of objects", 'give [{"from": "human", "value": "…"}, …]')
    renamed = [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        if {"from", "value"} <= turn.keys()
        else turn
        for turn in turns
    ]
    return _chat(renamed)


def _instruction(fields: Mapping[str, Any], instruction: str, output: str) -> Parts:
    """Read Alpaca's row: its input, where there is one, stands below the instruction."""
    given = _string(fields, "input") if fields.get("input") else ""
    prompt = _string(fields, instruction)
    return f"{prompt}\n\n{given}" if given else prompt, _string(fields, output), ()


def _text(fields: Mapping[str, Any], text: str) -> Parts:
    return "", _string(fields, text), ()


_READERS: Mapping[tuple[str, ...], Callable[..., Parts]] = {
    ("prompt", "completion"): _pair,
    ("question", "answer"): _pair,
    ("messages",): _messages,
    ("conversations",): _conversation,
    ("instruction", "output"): _instruction,
    ("text",): _text,
}


def rows_fingerprint(rows: Iterable[Row]) -> str:
    """Hash the contents of rows, and their numbers."""
    digest = hashlib.sha256()
    for row in rows:
        content = [row.number, row.prompt, row.completion, *map(list, row.messages)]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()
