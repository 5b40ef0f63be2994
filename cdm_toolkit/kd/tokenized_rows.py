"""One row in the tokens of one model: its ids, the labels among them, and the part that is aligned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int32

from cdm_toolkit.alignment.segments import project
from cdm_toolkit.errors import BadOption, UnknownName, UnsupportedTokenizer
from cdm_toolkit.kd.chat_template import ChatTemplate, Piece, Rendered, chat_template, no_chat_template
from cdm_toolkit.kd.rows import Row
from cdm_toolkit.tokdiff.spans import TokenSpans
from cdm_toolkit.tokdiff.view import TokenizerView

TemplateName = Literal["none", "chat"]
"""none: prompt, line feed, completion. chat: each side's own chat template."""

END_ROLES = frozenset({"turn_end", "eos"})
_PROBE = Row(1, "question", "answer")


@dataclass(frozen=True, slots=True)
class TokenizerSide:
    """A tokenizer with what a model of it expects around a text: bos and eos, or a chat template."""

    view: TokenizerView
    start: int | None
    """Gives the first token of a text a context: bos, else eos (as lm-eval does)."""
    eos: int | None
    chat: ChatTemplate | None = None
    """Writes the markers of a chat, bos among them: with it `start` and `eos` are not added."""

    @property
    def shift(self) -> int:
        return int(self.start is not None)

    def framed(self, ids: Int32[np.ndarray, " time"], *, ended: bool) -> Int32[np.ndarray, " _"]:
        before = [] if self.start is None else [self.start]
        after = [self.eos] if ended and self.eos is not None else []
        return np.concatenate((before, ids, after)).astype(np.int32)


@dataclass(frozen=True, slots=True)
class TeacherSide:
    """A teacher's tokenizer, and how its tokens are aligned with the student's."""

    side: TokenizerSide
    aligner: str = "anchored"


def tokenizer_side(tokenizer: Any, view: TokenizerView) -> TokenizerSide:
    """Take what stands around a text from the settings of a transformers tokenizer."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return TokenizerSide(view, eos if bos is None else bos, eos, chat_template(tokenizer, view.name))


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedRow:
    """A row in the tokens of one model.

    `body` are the tokens that are aligned, with their spans in a text that all sides share; they are
    `ids[body_start:body_start + len(body)]`. `ids[label_from:]` are the labels. `end` is the index of the token
    that ends the text or the turn, the last one; None where there is none.
    """

    ids: Int32[np.ndarray, " time"]
    label_from: int
    body: TokenSpans
    body_start: int
    end: int | None


def has_completion(row: Row, template: TemplateName) -> bool:
    """Say whether there is anything to learn; templates may strip blanks."""
    return bool(row.completion.strip() if template == "chat" else row.completion)


def tokenize_rows(side: TokenizerSide, rows: Sequence[Row], template: TemplateName) -> list[TokenizedRow]:
    """Tokenize rows that have a completion. Raises UnknownName, under `chat` UnsupportedTokenizer and BadOption."""
    if template not in get_args(TemplateName):
        raise UnknownName("template", template, get_args(TemplateName))
    if template == "chat":
        rendered = [_rendered(side, row) for row in rows]
        spans = side.view.encode_batch([chat.text for chat in rendered])
        return [_tokenize_chat(side, *each) for each in zip(rendered, spans, strict=True)]
    spans = side.view.encode_batch([row.text for row in rows])
    return [_tokenize_text(side, *each) for each in zip(rows, spans, strict=True)]


def _tokenize_text(side: TokenizerSide, row: Row, spans: TokenSpans) -> TokenizedRow:
    """Frame a text; a token is a label when it begins in the completion, and has one before it."""
    first = int(np.searchsorted(spans.start, row.completion_start))  # start never decreases
    ids = side.framed(spans.ids, ended=True)
    return TokenizedRow(
        ids=ids,
        label_from=max(side.shift + first, 1),
        body=spans,
        body_start=side.shift,
        end=None if side.eos is None else len(ids) - 1,
    )


def _rendered(side: TokenizerSide, row: Row) -> Rendered:
    if side.chat is None:
        raise no_chat_template(side.view.name)
    if not row.chat:
        raise BadOption("template", "chat", f"none, since row {row.number} is a text without a prompt")
    return side.chat.render(row.chat, of=f"the messages of row {row.number}")


def _tokenize_chat(side: TokenizerSide, rendered: Rendered, spans: TokenSpans) -> TokenizedRow:
    """Find the last message's tokens in a rendering, which ends here with the end of its turn.

    A token that reaches from the template into the message is a label where it has nothing but blanks of the
    template, as a model generates it; a line feed before the message is the prompt's.
    """
    content, whole = rendered.contents[-1], rendered.whole[-1]
    if content is None or whole is None:
        raise UnsupportedTokenizer(
            side.view.name, "its chat template leaves out the last message", "train with template none"
        )
    first, body_from = (int(np.searchsorted(spans.end, offset, "right")) for offset in (whole[0], content[0]))
    after = int(np.searchsorted(spans.start, content[1]))
    if first < len(spans) and spans.text_bytes[spans.start[first] : whole[0]].strip(b" "):
        first += 1
    end = _turn_end(spans, after)
    return TokenizedRow(
        ids=spans.ids[: len(spans) if end is None else end + 1],
        label_from=max(first, 1),
        body=_inside(spans, body_from, after, content),
        body_start=body_from,
        end=end,
    )


def _turn_end(spans: TokenSpans, after: int) -> int | None:
    """Find the token that ends the turn: the first special one of such a role, else the first special one."""
    special = [after + i for i in np.flatnonzero(spans.special[after:]).tolist()]
    ends = [i for i in special if END_ROLES & spans.view.special[int(spans.ids[i])].roles]
    return next(iter(ends or special), None)


def _inside(spans: TokenSpans, first: int, last: int, piece: Piece) -> TokenSpans:
    """Take the tokens `[first, last)` as a text of their own, that of the piece in which they lie.

    A blank of the template on the first of them is left out, as a dummy prefix is: the bytes decide.
    """
    part = slice(first, last)
    ids, special, exact = spans.ids[part], spans.special[part], spans.exact[part]
    cut = TokenSpans(spans.view, spans.text_bytes, ids, spans.start[part], spans.end[part], special, exact)
    side = project(cut, [piece])
    return TokenSpans(spans.view, side.text, ids, side.start, side.end, special, exact)


def template_fingerprint(side: TokenizerSide, template: TemplateName) -> str:
    """Hash what a side puts around a text."""
    around = side.chat and [side.chat.source, *side.chat.tokens]
    used = around if template == "chat" else [side.start, side.eos]
    return hashlib.sha256(json.dumps([template, used]).encode()).hexdigest()


def template_notes(
    student: TokenizerSide, teachers: Sequence[TeacherSide], template: TemplateName
) -> list[str]:
    """Say in which ways `template` does not suit the tokenizers, for a person to look at before a run."""
    sides = [("student", student)] + [("teacher", teacher.side) for teacher in teachers]
    if template == "none":
        return [
            f"the {role} {side.view.name} has a chat template, which template none does not use"
            for role, side in sides
            if side.chat is not None
        ]
    notes = [
        f"the {role} {side.view.name} has no chat template, which template chat needs"
        for role, side in sides
        if side.chat is None
    ]
    if student.chat is not None and tokenize_rows(student, [_PROBE], "chat")[0].end is None:
        notes.append(
            f"the chat template of the student {student.view.name} ends no turn with a special token: "
            "it will not learn where to stop"
        )
    return notes
