"""Render one chat with each tokenizer's own template, and align the two texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cdm_toolkit.alignment.aligners import TextAlignment
from cdm_toolkit.alignment.chat import align_segments
from cdm_toolkit.errors import UnsupportedTokenizer
from cdm_toolkit.hub.tokenizers import Loaded

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as one text, and the bytes `[start, end)` of each message's content in it, None where it is left out.

    Blanks at both ends of a content are not counted in, since some templates strip them.
    """

    text: str
    contents: tuple[tuple[int, int] | None, ...]


def render(loaded: Loaded, messages: Messages) -> Rendered:
    """Render messages with a tokenizer's template. Raises UnsupportedTokenizer where it has none or refuses them."""
    text = _apply(loaded, messages)
    # Where a content lies is read off a second rendering, in which a mark that no text has stands for each:
    # a search for the content alone would find `user` in the template's own words.
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = _apply(
        loaded, [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    )
    order = sorted((place, i) for i, mark in enumerate(marks) if (place := marked.find(mark)) >= 0)
    found: list[tuple[int, int] | None] = [None] * len(messages)
    at, marked_at = 0, 0
    for place, i in order:
        before = marked[marked_at:place]
        content = messages[i]["content"].strip()
        start = text.find(content, at + len(before))
        if not text.startswith(before, at) or start < 0 or text[at + len(before) : start].strip():
            raise UnsupportedTokenizer(
                loaded.view.name,
                f"its chat template rewrites the content of message {i + 1}",
                "align without --chat",
            )
        at, marked_at = start + len(content), place + len(marks[i])
        # what the template strips, it may keep: skip it
        trailing = messages[i]["content"][len(messages[i]["content"].rstrip()) :]
        found[i] = (len(text[:start].encode()), len(text[:at].encode()))
        if trailing and text.startswith(trailing, at):
            at += len(trailing)
    return Rendered(text, tuple(found))


def align_chat(loaded_t: Loaded, loaded_s: Loaded, messages: Messages) -> TextAlignment:
    """Align one chat as two models read it: message contents by bytes, markers by role, the rest by DTW."""
    rendered_t, rendered_s = render(loaded_t, messages), render(loaded_s, messages)
    pieces_t, pieces_s = [], []
    for piece_t, piece_s in zip(rendered_t.contents, rendered_s.contents, strict=True):
        in_order = (
            piece_t
            and piece_s
            and all(
                not pieces or pieces[-1][1] <= piece[0]
                for pieces, piece in ((pieces_t, piece_t), (pieces_s, piece_s))
            )
        )
        if in_order:
            pieces_t.append(piece_t)
            pieces_s.append(piece_s)
    t, s = loaded_t.view.encode(rendered_t.text), loaded_s.view.encode(rendered_s.text)
    return TextAlignment(t, s, align_segments(t, pieces_t, s, pieces_s))


def _apply(loaded: Loaded, messages: Messages) -> str:
    if not loaded.tokenizer.chat_template:
        raise UnsupportedTokenizer(
            loaded.view.name, "it has no chat template", "name a tokenizer of an instruction-tuned model"
        )
    try:
        return str(
            loaded.tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
        )
    except Exception as error:  # jinja2's errors, and whatever a template raises
        raise UnsupportedTokenizer(
            loaded.view.name,
            f"its chat template refuses these messages: {error}",
            "give messages that it knows",
        ) from error
