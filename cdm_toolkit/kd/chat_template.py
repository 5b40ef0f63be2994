"""Render a chat with a tokenizer's own template, and find the messages' contents in the rendering."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from cdm_toolkit.errors import UnsupportedTokenizer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Piece = tuple[int, int]

_WITHOUT = "go without it: align plain texts with `align_text`, or train with `template='none'`"

_KNOWS_TOOLS = "give the tokenizer a chat template that writes it, or leave out rows that call tools"
_LAST = "learn the last turn alone, with `learn='last'`"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered chat, with the byte range `[start, end)` of each message's content, None where it is left out.

    `contents` exclude whitespace at both ends, since some templates strip it; `whole` includes what the template keeps.
    `turn_ends` are the bytes at which the turns end, of the messages that were asked for.
    """

    text: str
    contents: tuple[Piece | None, ...]
    whole: tuple[Piece | None, ...]
    turn_ends: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template without its tokenizer: only strings, so that it can be pickled and hashed."""

    tokenizer: str
    """Name of the tokenizer, for error messages."""
    source: str
    """Jinja source."""
    tokens: tuple[tuple[str, str], ...]
    """Variables of the template: bos_token, eos_token, ... by name."""

    def render(self, messages: Messages, *, of: str = "these messages") -> Rendered:
        """Render messages, and find all contents; `of` names them in errors.

        Raises UnsupportedTokenizer where they are refused, or a content is rewritten.
        """
        return self._find(messages, (), range(len(messages)), of)

    def render_turns(
        self, messages: Messages, learned: Sequence[int], *, tools: Tools = (), of: str = "these messages"
    ) -> Rendered:
        """Render a chat, and find the contents and the ends of the turns that are learned, in order.

        `tools` are what the chat may call. Raises UnsupportedTokenizer where the template refuses the messages, leaves
        out or rewrites a learned one, leaves out a call of a tool or its result, or writes a turn otherwise once others
        follow it: that turn would be learned after a text that it does not follow in use.
        """
        rendered = self._find(messages, tools, learned, of)
        for nth in learned:
            if rendered.contents[nth] is None:
                raise self._cannot(f"leaves out message {nth + 1} of {of}")
        self._check_tools(messages, tools, of)
        ends = []
        for nth in learned:
            part = messages[: nth + 1]
            until = self._apply(part, tools, of) if len(part) < len(messages) else rendered.text
            if not rendered.text.startswith(until):
                raise self._cannot(
                    f"writes message {nth + 1} of {of} otherwise where others follow it", _LAST
                )
            ends.append(len(until.encode()))
        return replace(rendered, turn_ends=tuple(ends))

    def _find(self, messages: Messages, tools: Tools, wanted: Collection[int], of: str) -> Rendered:
        text = self._apply(messages, tools, of)
        # Render a second time with a unique marker in place of each content, to locate the contents: searching for
        # a content itself could match the template text, such as `user`.
        marks = {nth: _mark(nth) for nth in wanted}
        marked = self._apply(
            [
                {**message, "content": marks.get(nth, message["content"])}
                for nth, message in enumerate(messages)
            ],
            tools,
            of,
        )
        order = sorted((offset, i) for i, mark in marks.items() if (offset := marked.find(mark)) >= 0)
        contents: list[Piece | None] = [None] * len(messages)
        whole: list[Piece | None] = [None] * len(messages)
        at, before = 0, marked[: order[0][0]] if order else marked
        for (offset, i), (next_offset, _) in pairwise([*order, (len(marked), 0)]):
            given, content = messages[i]["content"], messages[i]["content"].strip()
            first = at + len(before)
            start = text.find(content, first)
            if not text.startswith(before, at) or start < 0 or text[first:start].strip():
                raise self._cannot(f"rewrites the content of message {i + 1} of {of}")
            at = end = start + len(content)
            before = marked[offset + len(marks[i]) : next_offset]
            trailing = given[len(given.rstrip()) :]
            if text.startswith(trailing + before, end):  # else the template strips it
                at = end + len(trailing)
            contents[i] = _in_bytes(text, start, end)
            whole[i] = _in_bytes(text, first, at)
        return Rendered(text, tuple(contents), tuple(whole))

    def _check_tools(self, messages: Messages, tools: Tools, of: str) -> None:
        """See that calls of tools and their results are written: some templates leave them out without a word."""
        calls = [nth for nth, message in enumerate(messages) if message.get("tool_calls")]
        results = [nth for nth, message in enumerate(messages) if message["role"] == "tool"]
        if not calls and not results:
            return
        marked = [dict(message) for message in messages]
        for nth in results:
            marked[nth]["content"] = _mark(nth)
        for nth in calls:
            marked[nth]["tool_calls"] = [
                {**call, "function": {**call["function"], "name": _mark(nth)}}
                for call in messages[nth]["tool_calls"]
            ]
        written = self._apply(marked, tools, of)
        for what, those in (("tool call", calls), ("result of the tool", results)):
            if missing := [nth + 1 for nth in those if _mark(nth) not in written]:
                raise self._cannot(f"leaves out the {what} in message {missing[0]} of {of}", _KNOWS_TOOLS)

    def _cannot(self, does: str, fix: str = _WITHOUT) -> UnsupportedTokenizer:
        return UnsupportedTokenizer(self.tokenizer, f"its chat template {does}", fix)

    def _apply(self, messages: Messages, tools: Tools, of: str) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.source,
                tools=[dict(tool) for tool in tools] or None,
                **dict(self.tokens),
            )
        except Exception as error:  # errors of jinja2, and any that a template raises
            why = f"its chat template refuses {of}: {error}"
            raise UnsupportedTokenizer(self.tokenizer, why, "give messages that it knows") from error
        return str(rendered[0])


def _mark(nth: int) -> str:
    return f"\ue000{nth}\ue001"


def chat_template(tokenizer: Any, name: str) -> ChatTemplate | None:
    """Take the chat template of a transformers tokenizer; None where it has none.

    Raises UnsupportedTokenizer for several templates without a default.
    """
    if not tokenizer.chat_template:
        return None
    try:
        source = tokenizer.get_chat_template()
    except ValueError:
        why = "it has several chat templates, none of which is the default"
        raise UnsupportedTokenizer(name, why, "leave one in its tokenizer_config.json") from None
    tokens = sorted(
        (role, text) for role, text in tokenizer.special_tokens_map.items() if isinstance(text, str)
    )
    return ChatTemplate(name, source, tuple(tokens))


def no_chat_template(tokenizer: str) -> UnsupportedTokenizer:
    """Make the error for a tokenizer without a chat template."""
    return UnsupportedTokenizer(
        tokenizer, "it has no chat template", "name a tokenizer of an instruction-tuned model"
    )


def _in_bytes(text: str, start: int, end: int) -> Piece:
    first = len(text[:start].encode())
    return first, first + len(text[start:end].encode())
