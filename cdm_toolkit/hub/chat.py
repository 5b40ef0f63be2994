"""Render a chat with each tokenizer's chat template, and align the two texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cdm_toolkit.alignment.aligners import TextAlignment
from cdm_toolkit.alignment.chat import align_segments
from cdm_toolkit.errors import UnsupportedTokenizer
from cdm_toolkit.hub.tokenizers import Loaded

Messages = Sequence[Mapping[str, str]]
Piece = tuple[int, int]

_WITHOUT = "go without it: align without --chat, or train with template none"


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


def chat_template(loaded: Loaded) -> ChatTemplate | None:
    """Return a tokenizer's chat template, None if it has none. Raises UnsupportedTokenizer if it has several."""
    if not loaded.tokenizer.chat_template:
        return None
    try:
        source = loaded.tokenizer.get_chat_template()
    except ValueError:
        why = "it has several chat templates, none of which is the default"
        raise UnsupportedTokenizer(loaded.view.name, why, "leave one in its tokenizer_config.json") from None
    tokens = sorted(
        (name, text) for name, text in loaded.tokenizer.special_tokens_map.items() if isinstance(text, str)
    )
    return ChatTemplate(loaded.view.name, source, tuple(tokens))


def no_chat_template(tokenizer: str) -> UnsupportedTokenizer:
    """Return the error for a tokenizer without a chat template."""
    return UnsupportedTokenizer(
        tokenizer, "it has no chat template", "name a tokenizer of an instruction-tuned model"
    )


def render(loaded: Loaded, messages: Messages) -> Rendered:
    """Render messages with a tokenizer's template. Raises UnsupportedTokenizer where it has none or refuses them."""
    template = chat_template(loaded)
    if template is None:
        raise no_chat_template(loaded.view.name)
    return template.render(messages)


def align_chat(loaded_t: Loaded, loaded_s: Loaded, messages: Messages) -> TextAlignment:
    """Align one chat, rendered for two models: contents by bytes, special tokens by role, template text by DTW."""
    rendered_t, rendered_s = render(loaded_t, messages), render(loaded_s, messages)
    pieces_t: list[Piece] = []
    pieces_s: list[Piece] = []
    for piece_t, piece_s in zip(rendered_t.contents, rendered_s.contents, strict=True):
        if piece_t and piece_s and _follows(piece_t, pieces_t) and _follows(piece_s, pieces_s):
            pieces_t.append(piece_t)
            pieces_s.append(piece_s)
    t, s = loaded_t.view.encode(rendered_t.text), loaded_s.view.encode(rendered_s.text)
    return TextAlignment(t, s, align_segments(t, pieces_t, s, pieces_s))


def _follows(piece: Piece, pieces: Sequence[Piece]) -> bool:
    return not pieces or pieces[-1][1] <= piece[0]


def _in_bytes(text: str, start: int, end: int) -> Piece:
    first = len(text[:start].encode())
    return first, first + len(text[start:end].encode())
