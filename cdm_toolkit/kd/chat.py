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
    """A chat as one text, and the bytes `[start, end)` of each message's content in it, None where it is left out.

    Blanks at both ends of a content are not counted in, since some templates strip them; `whole` has those that
    the template keeps.
    """

    text: str
    contents: tuple[Piece | None, ...]
    whole: tuple[Piece | None, ...]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A tokenizer's chat template by itself: texts alone, so that it can be sent to a process and hashed."""

    tokenizer: str
    """The name, for errors."""
    source: str
    """In Jinja."""
    tokens: tuple[tuple[str, str], ...]
    """bos_token, eos_token, ... by name, which templates write."""

    def render(self, messages: Messages, *, of: str = "these messages") -> Rendered:
        """Render messages; `of` names them in errors. Raises UnsupportedTokenizer where they are refused."""
        text = self._apply(messages, of)
        # Where a content lies is read off a second rendering, in which a mark that no text has stands for each:
        # a search for the content alone would find `user` in the template's own words.
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        marked = self._apply(
            [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)], of
        )
        order = sorted((place, i) for i, mark in enumerate(marks) if (place := marked.find(mark)) >= 0)
        contents: list[Piece | None] = [None] * len(messages)
        whole: list[Piece | None] = [None] * len(messages)
        at, before = 0, marked[: order[0][0]] if order else marked
        for (place, i), (next_place, _) in pairwise([*order, (len(marked), 0)]):
            given, content = messages[i]["content"], messages[i]["content"].strip()
            first = at + len(before)
            start = text.find(content, first)
            if not text.startswith(before, at) or start < 0 or text[first:start].strip():
                why = f"its chat template rewrites the content of message {i + 1} of {of}"
                raise UnsupportedTokenizer(self.tokenizer, why, _WITHOUT)
            at = end = start + len(content)
            before = marked[place + len(marks[i]) : next_place]
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
        except Exception as error:  # jinja2's errors, and whatever a template raises
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
