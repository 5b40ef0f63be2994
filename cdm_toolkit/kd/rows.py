"""A training row: a prompt, which is read, and a completion, which is learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FIELDS = (
    "prompt and completion, question and answer, messages, conversations, instruction and output, or text"
)


Learn = Literal["all", "last"]
"""Which of a chat's assistant turns are learned; one that calls a tool is read alone."""


class Message(NamedTuple):
    """One message of a chat; `more` has what only a template reads, such as tool_calls, by name."""

    role: str
    content: str
    more: Mapping[str, Any] = {}

    def __hash__(self) -> int:
        return hash((self.role, self.content))

    @property
    def is_answer(self) -> bool:
        """Whether the assistant says it, and calls no tool."""
        return self.role == "assistant" and "tool_calls" not in self.more

    def as_dict(self) -> dict[str, Any]:
        """Write it as a template reads it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True, slots=True)
class GivenIds:
    """A row as one model has read or written it: ids that are kept as they are, never encoded anew.

    `tokenizer` is the fingerprint of the tokenizer that they are of, `turns` are the ids that are learned, as half-open
    ranges in order. `pieces` are the byte ranges of the row's text that other sides learn; without any these are the
    completion, or the learned messages.
    """

    tokenizer: str
    ids: tuple[int, ...]
    turns: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[int, int], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Write it as a row's field `given`, which `row_of` reads."""
        ranges = {"turns": [*map(list, self.turns)], "pieces": [*map(list, self.pieces)]}
        return {"tokenizer": self.tokenizer, "ids": list(self.ids), **ranges}


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
    earlier: tuple[int, ...] = ()
    """Indices of the messages before the last that are learned too."""
    tools: Sequence[Mapping[str, Any]] = field(default=(), hash=False)
    """What the assistant may call, as JSON schemas that templates read."""
    given: GivenIds | None = None
    """Where the row's ids on one side are given: the other sides encode its text."""
    ended: bool = True
    """Whether the text has an end to learn: false where it was cut."""

    def given_to(self, tokenizer: str) -> GivenIds | None:
        """Give the ids of the side that has the tokenizer of this fingerprint, where they are given."""
        return self.given if self.given is not None and self.given.tokenizer == tokenizer else None

    @property
    def completion_is_given(self) -> bool:
        """Whether ids of one side are given for the completion of a text with a prompt: what is aligned is it alone."""
        return self.given is not None and not self.given.pieces and not self.messages and bool(self.prompt)

    @property
    def learned(self) -> tuple[int, ...]:
        """Indices of the messages of `chat` that are learned."""
        return *self.earlier, len(self.messages or (0, 1)) - 1

    @property
    def learned_pieces(self) -> list[tuple[int, int]]:
        """Where what is learned is, as byte ranges `[start, end)` of `text`."""
        if self.given is not None and self.given.pieces:
            return list(self.given.pieces)
        if not self.messages:
            return [(self.completion_start, len(self.text.encode()))]
        lengths = [len(message.content.encode()) for message in self.messages]
        starts = [sum(lengths[:nth]) + nth for nth in range(len(lengths))]
        return [(starts[nth], starts[nth] + lengths[nth]) for nth in self.learned]

    @property
    def calls_tools(self) -> bool:
        return any("tool_calls" in message.more for message in self.messages)

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The row as messages; empty where it is a text without a prompt, which is no conversation."""
        if self.messages:
            return [one.as_dict() for one in self.messages]
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


def row_of(number: int, fields: Any, shape: tuple[str, ...] | None = None, *, learn: Learn = "all") -> Row:
    """Make a row of a mapping, such as a line of a file. RowFault where a field is missing or no text.

    `shape` is that of the fields, where it is known. `learn` says which turns of a chat are learned.
    """
    names = shape or shape_of(fields)
    read = _READERS[names](fields, *names)
    given, ended = _given(fields.get("given")), _ended(fields.get("ended"))
    if not isinstance(read, list):
        return Row(number, *read, given=given, ended=ended)
    *earlier, last = (nth for nth, one in enumerate(read) if one.is_answer)
    return Row(
        number,
        prompt="\n".join(one.content for one in read[:last]),
        completion=read[last].content,
        messages=tuple(read[: last + 1]),
        earlier=tuple(earlier) if learn == "all" else (),
        tools=_tools(fields.get("tools")),
        given=given,
        ended=ended,
    )


def chat_of(messages: Any) -> list[dict[str, Any]]:
    """Check a list of messages, each with a role and a content. RowFault."""
    return [one.as_dict() for one in _read_messages(messages)]


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

MORE = ("name", "tool_calls", "tool_call_id")
"""What a message may have beside its role and content."""
CALL = "function_call"
"""The role of a turn of ShareGPT that is a call of a tool, as JSON."""

Read = tuple[str, str] | list[Message]
"""Prompt and completion, or the messages of a chat."""


def shape_of(fields: Any) -> tuple[str, ...]:
    """Name the fields that say what a row is, such as prompt and completion. RowFault where there are none."""
    if not isinstance(fields, Mapping):
        raise RowFault("it is not a JSON object", f"give each row {FIELDS}")
    for names in _READERS:
        if all(name in fields for name in names):
            return names
    has = ", ".join(map(str, fields)) or "no field"
    raise RowFault(f"it has {has}", f"give each row {FIELDS}, or name its columns with `columns`")


def _pair(fields: Mapping[str, Any], prompt: str, completion: str) -> Read:
    """Read two texts, or two lists of messages as TRL writes them: the prompt's, then the completion's."""
    both = fields[prompt], fields[completion]
    if all(isinstance(each, list) for each in both):
        return _chat([message for each in both for message in each])
    return _string(fields, prompt), _string(fields, completion)


def _messages(fields: Mapping[str, Any], name: str) -> Read:
    return _chat(fields[name])


def _chat(messages: Any) -> list[Message]:
    """Check messages, one of which is an answer of the assistant to learn."""
    read = _read_messages(messages)
    if not any(one.is_answer for one in read):
        raise RowFault("no message is an answer of the assistant", "leave out conversations without one")
    return read


def _read_messages(messages: Any) -> list[Message]:
    return [_message(nth, one) for nth, one in enumerate(_mappings("messages", messages), 1)]


def _mappings(name: str, given: Any) -> list[Mapping[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise RowFault(f"{name} is not a list of objects", f"give {_SHOWN[name]}")
    if not given:
        raise RowFault(f"{name} is empty", f"give {_SHOWN[name]}")
    return given


def _message(nth: int, given: Mapping[str, Any]) -> Message:
    more = {name: _whole(given[name]) for name in MORE if given.get(name)}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(nth, more["tool_calls"])
        given = {**given, "content": given.get("content") or ""}
    for field_name in ("role", "content"):
        if field_name not in given:
            raise RowFault(f"message {nth} has no {field_name}", "give each message a role and a content")
    role = _string(given, "role")
    return Message(ROLES.get(role, role), _string(given, "content"), more)


def _calls(nth: int, calls: Any) -> list[dict[str, Any]]:
    """Read calls of tools; arguments that are JSON in a string, as OpenAI's are, become an object for templates."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowFault(f"tool_calls of message {nth} is not a list of objects", f"give {_CALL}")
    return [_one_call(nth, call) for call in calls]


def _one_call(nth: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowFault(f"a tool call of message {nth} names no function", f"give {_CALL}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(f"arguments of a tool call of message {nth}", arguments)
    around = call if "function" in call else {}
    return {"type": "function", **around, "function": {"name": function["name"], "arguments": arguments}}


def _tools(given: Any) -> list[dict[str, Any]]:
    """Read the tools that a chat may call; they may be JSON in a string, as tables have them."""
    tools = _parsed("tools", given) if isinstance(given, str) and given else given
    return [dict(_whole(tool)) for tool in _mappings("tools", tools)] if tools else []


def _given(found: Any) -> GivenIds | None:
    """Read the ids of one side, as `GivenIds.as_dict` writes them."""
    if found is None:
        return None
    try:
        turns, pieces = (
            tuple((int(first), int(end)) for first, end in found.get(name) or ())
            for name in ("turns", "pieces")
        )
        return GivenIds(str(found["tokenizer"]), tuple(map(int, found["ids"])), turns, pieces)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise RowFault("given is no record of ids", f"give {_SHOWN['given']}, or leave it out") from None


def _ended(found: Any) -> bool:
    if found not in (None, True, False):
        raise RowFault(f"ended is {found!r}", "give true, or false where the text was cut")
    return found is not False


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RowFault(f"{name} is a string that is no JSON", "write JSON, or the object itself") from None


def _whole(value: Any) -> Any:
    """Leave out fields that are None: a table fills them in where other rows have such a field."""
    if isinstance(value, Mapping):
        return {name: _whole(each) for name, each in value.items() if each is not None}
    return [_whole(each) for each in value] if isinstance(value, list) else value


def _conversation(fields: Mapping[str, Any], name: str) -> Read:
    """Read the turns of ShareGPT, each with `from` and `value`."""
    return _chat([_turn(nth, turn) for nth, turn in enumerate(_mappings(name, fields[name]), 1)])


def _turn(nth: int, turn: Mapping[str, Any]) -> Mapping[str, Any]:
    if not {"from", "value"} <= turn.keys():
        return turn
    if turn["from"] != CALL:
        return {"role": turn["from"], "content": turn["value"]}
    calls = _parsed(f"turn {nth}, a {CALL},", _string(turn, "value"))
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _instruction(fields: Mapping[str, Any], instruction: str, output: str) -> Read:
    """Read Alpaca's row: its input, where there is one, stands below the instruction."""
    given = _string(fields, "input") if fields.get("input") else ""
    prompt = _string(fields, instruction)
    return f"{prompt}\n\n{given}" if given else prompt, _string(fields, output)


def _text(fields: Mapping[str, Any], text: str) -> Read:
    return "", _string(fields, text)


_CALL = '{"function": {"name": "…", "arguments": {…}}}'
_SHOWN = {
    "messages": '[{"role": "user", "content": "…"}, …]',
    "conversations": '[{"from": "human", "value": "…"}, …]',
    "given": '{"tokenizer": "(fingerprint)", "ids": […], "turns": [[first, end], …]}',
    "tools": '[{"type": "function", "function": {"name": "…", …}}, …]',
}
_READERS: Mapping[tuple[str, ...], Callable[..., Read]] = {
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
    others: list[Any]
    for row in rows:
        messages = [[one.role, one.content, *([one.more] if one.more else ())] for one in row.messages]
        others = [part for part in (row.earlier, row.tools) if part]
        others += [row.given.as_dict()] if row.given is not None else []
        others += [] if row.ended else ["cut"]
        content = [row.number, row.prompt, row.completion, *messages, *others]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()
