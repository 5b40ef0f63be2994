"""Render a chat with a tokenizer's own template, and find the messages' contents in the rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cdm_toolkit.errors import UnsupportedTokenizer

Messages = Sequence[Mapping[str, str]]
Piece = tuple[int, int]

_WITHOUT = "go without it: align plain texts with `align_text`, or train with `template='none'`"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered chat, with the byte range `[start, end)` of each message's content, None where it is left out.

    `contents` exclude whitespace at both ends, since some templates strip it; `whole` includes what the template keeps.
    """

    text: str
    contents: tuple[Piece | None, ...]
    whole: tuple[Piece | None, ...]


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
        """Render messages; `of` names them in errors. Raises UnsupportedTokenizer where they are refused."""
        text = self._apply(messages, of)
        # Render a second time with a unique marker in place of each content, to locate the contents: searching for
        # a content itself could match the template text, such as `user`.
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        marked = self._apply(
            [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)], of
        )
        order = sorted((offset, i) for i, mark in enumerate(marks) if (offset := marked.find(mark)) >= 0)
        contents: list[Piece | None] = [None] * len(messages)
        whole: list[Piece | None] = [None] * len(messages)
        at, before = 0, marked[: order[0][0]] if order else marked
        for (offset, i), (next_offset, _) in pairwise([*order, (len(marked), 0)]):
            given, content = messages[i]["content"], messages[i]["content"].strip()
            first = at + len(before)
            start = text.find(content, first)
            if not text.startswith(before, at) or start < 0 or text[first:start].strip():
                why = f"its chat template rewrites the content of message {i + 1} of {of}"
                raise UnsupportedTokenizer(self.tokenizer, why, _WITHOUT)
            at = end = start + len(content)
            before = marked[offset + len(marks[i]) : next_offset]
            trailing = given[len(given.rstrip()) :]
            if text.startswith(trailing + before, end):  # else the template strips it
                at = end + len(trailing)
            contents[i] = _in_bytes(text, start, end)
            whole[i] = _in_bytes(text, first, at)
        return Rendered(text, tuple(contents), tuple(whole))

    def _apply(self, messages: Messages, of: str) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.source,
                **dict(self.tokens),
            )
        except Exception as error:  # errors of jinja2, and any that a template raises
            why = f"its chat template refuses {of}: {error}"
            raise UnsupportedTokenizer(self.tokenizer, why, "give messages that it knows") from error
        return str(rendered[0])


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
