"""One row in the tokens of one model: its ids, the labels among them, and the parts that are aligned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int32

from cdm_toolkit.alignment.segments import project
from cdm_toolkit.errors import BadOption, UnknownName
from cdm_toolkit.kd.chat_template import ChatTemplate, Piece, Rendered, chat_template, no_chat_template
from cdm_toolkit.kd.rows import GivenIds, Row
from cdm_toolkit.tokdiff.spans import TokenSpans, does_not_spell, spell_ids
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


Turns = Int32[np.ndarray, "_ 2"]
"""What is learned of a row, as half-open ranges of its ids: one range a turn, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """Tokens that are aligned: `ids[start:start + len(spans)]`, with their spans in a text that all sides share.

    `end` is the index of the token that ends the text or the turn; None where there is none.
    """

    spans: TokenSpans
    start: int
    end: int | None


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedRow:
    """A row in the tokens of one model; on all sides it has equally many `turns` and `bodies`.

    A text has one body, of which its turns are parts; a chat has one for each of its turns, and a text of which one
    side's completion is given has that completion.
    """

    ids: Int32[np.ndarray, " time"]
    turns: Turns
    bodies: tuple[Body, ...]

    @property
    def label_from(self) -> int:
        """Index of the first label."""
        return int(self.turns[0, 0])


def has_completion(row: Row, template: TemplateName) -> bool:
    """Say whether there is anything to learn; templates may strip blanks."""
    learned = [row.messages[nth].content for nth in row.learned] if row.messages else [row.completion]
    return any(text.strip() if template == "chat" else text for text in learned)


def tokenize_rows(side: TokenizerSide, rows: Sequence[Row], template: TemplateName) -> list[TokenizedRow]:
    """Tokenize rows that have a completion; where the ids of this side are given, they are taken.

    Raises UnknownName, under `chat` UnsupportedTokenizer and BadOption, DoesNotSpell for given ids of another text.
    """
    if template not in get_args(TemplateName):
        raise UnknownName("template", template, get_args(TemplateName))
    encoded = [row for row in rows if row.given_to(side.view.fingerprint) is None]
    tokenized = iter(_encode_rows(side, encoded, template) if encoded else ())
    return [
        next(tokenized)
        if (given := row.given_to(side.view.fingerprint)) is None
        else _take_given(side, row, given, template)
        for row in rows
    ]


def _encode_rows(side: TokenizerSide, rows: Sequence[Row], template: TemplateName) -> list[TokenizedRow]:
    if template == "chat":
        rendered = [_rendered(side, row) for row in rows]
        spans = side.view.encode_batch([chat.text for _, chat in rendered])
        return [_tokenize_chat(*each, of_row) for each, of_row in zip(rendered, spans, strict=True)]
    for row in rows:
        if row.calls_tools:
            raise BadOption(
                "template", "none", f"chat, since row {row.number} calls a tool, which only a template writes"
            )
    spans = side.view.encode_batch([row.text for row in rows])
    return [_tokenize_text(side, *each) for each in zip(rows, spans, strict=True)]


def _tokenize_text(side: TokenizerSide, row: Row, spans: TokenSpans) -> TokenizedRow:
    """Frame a text; a token is a label when it begins in what is learned, and has one before it."""
    pieces = np.array(row.learned_pieces)
    # start never decreases
    turns = np.searchsorted(spans.start, pieces) + side.shift
    ids = side.framed(spans.ids, ended=row.ended)
    if pieces[-1, 1] == len(spans.text_bytes):
        turns[-1, 1] = len(ids)
    first = 0
    if row.completion_is_given:
        first = int(np.searchsorted(spans.end, row.completion_start, "right"))
        spans = _inside(spans, first, len(spans), (row.completion_start, len(spans.text_bytes)))
    ends = row.ended and side.eos is not None
    return TokenizedRow(
        ids=ids,
        turns=np.maximum(turns, 1).astype(np.int32),
        bodies=(Body(spans, first + side.shift, len(ids) - 1 if ends else None),),
    )


def _take_given(side: TokenizerSide, row: Row, given: GivenIds, template: TemplateName) -> TokenizedRow:
    """Find what is aligned among given ids: the text, its completion, or the learned messages of a chat."""
    if row.messages and template == "none":
        raise BadOption("template", "none", f"chat: row {row.number} is a chat, as a template wrote it")
    ids = np.array(given.ids, np.int32)
    texts, ranges = [row.text], [(0, len(ids))]
    if template == "chat":
        _check_chat(row)
        texts = [row.chat[nth]["content"].strip() for nth in row.learned]
        ranges = list(given.turns)
    elif row.completion_is_given:
        texts, ranges = [row.completion], list(given.turns)
    bodies = [_given_body(side.view, ids, *one) for one in zip(ranges, texts, strict=True)]
    return TokenizedRow(ids, np.array(given.turns, np.int32).reshape(-1, 2), tuple(bodies))


def _given_body(
    view: TokenizerView, ids: Int32[np.ndarray, " time"], within: tuple[int, int], text: str
) -> Body:
    """Place the ids in `within` in the text that they spell, up to blanks around it; a special token may end it."""
    first, last = within
    spelling = first + np.flatnonzero(~view.is_special[ids[first:last]])
    begin, after = (int(spelling[0]), int(spelling[-1]) + 1) if len(spelling) else (first, first)
    ends = after < last and bool(END_ROLES & view.special[int(ids[after])].roles)
    spans, wanted = spell_ids(view, ids[:after], first=begin), text.encode()
    at = max(spans.text_bytes.find(wanted), 0)
    piece = at, at + len(wanted)
    around = spans.text_bytes[:at] + spans.text_bytes[piece[1] :]
    if spans.text_bytes[slice(*piece)] != wanted or around.decode(errors="replace").strip():
        raise does_not_spell(view, wanted, spans.ids.tolist())
    inside = slice(
        *(int(np.searchsorted(*each)) for each in ((spans.end, at, "right"), (spans.start, piece[1])))
    )
    if len(spans.text_bytes) > len(wanted):
        spans = _inside(spans, inside.start, inside.stop, piece)
        begin += inside.start
    return Body(spans, begin, after if ends else None)


def tokenize_prompts(
    side: TokenizerSide, rows: Sequence[Row], template: TemplateName
) -> list[Int32[np.ndarray, " time"]]:
    """Tokenize what a model reads before it writes the completion of each row.

    Under `chat` that is the rendering up to the last answer; blanks before that are the answer's, as in training.
    Raises as `tokenize_rows`.
    """
    if template == "chat":
        texts = [_up_to_the_answer(*_rendered(side, replace(row, earlier=()))) for row in rows]
        return [spans.ids for spans in side.view.encode_batch(texts)]
    texts = [row.text[: len(row.text) - len(row.completion)] for row in rows]
    return [side.framed(spans.ids, ended=False) for spans in side.view.encode_batch(texts)]


def _up_to_the_answer(row: Row, rendered: Rendered) -> str:
    whole = rendered.whole[row.learned[-1]]
    assert whole  # `render_turns` has found it
    return rendered.text.encode()[: whole[0]].decode().rstrip(" ")


def _check_chat(row: Row) -> None:
    if not row.chat:
        raise BadOption("template", "chat", f"none, since row {row.number} is a text without a prompt")


def _rendered(side: TokenizerSide, row: Row) -> tuple[Row, Rendered]:
    if side.chat is None:
        raise no_chat_template(side.view.name)
    _check_chat(row)
    of = f"the messages of row {row.number}"
    return row, side.chat.render_turns(row.chat, row.learned, tools=row.tools, of=of)


def _tokenize_chat(row: Row, rendered: Rendered, spans: TokenSpans) -> TokenizedRow:
    """Find the tokens of the learned turns in a rendering, which ends here with the end of the last."""
    ends_turn = _end_of_the_last_turn(spans, rendered.contents[row.learned[-1]])
    turns, bodies = [], []
    for nth, turn_end in zip(row.learned, rendered.turn_ends, strict=True):
        turn, body = _turn(spans, rendered.contents[nth], rendered.whole[nth], turn_end, ends_turn)
        turns.append(turn)
        bodies.append(body)
    if bodies[-1].end is None:
        turns[-1] = turns[-1][0], len(spans)
    if not row.ended:
        last = bodies[-1]
        bodies[-1] = replace(last, end=None)
        turns[-1] = turns[-1][0], last.start + len(last.spans)
    return TokenizedRow(spans.ids[: turns[-1][1]], np.array(turns, np.int32), tuple(bodies))


def _turn(
    spans: TokenSpans, content: Piece | None, whole: Piece | None, turn_end: int, ends_turn: int | None
) -> tuple[tuple[int, int], Body]:
    """Find one learned turn: its labels, and what of it is aligned. `ends_turn` is the id that ends turns.

    A token that reaches from the template into the message is a label where it has nothing but blanks of the
    template, as a model generates it; a line feed before the message is the prompt's.
    """
    assert content
    assert whole  # `render_turns` has found them
    first, body_from = (int(np.searchsorted(spans.end, offset, "right")) for offset in (whole[0], content[0]))
    after = int(np.searchsorted(spans.start, content[1]))
    if first < len(spans) and spans.text_bytes[spans.start[first] : whole[0]].strip(b" "):
        first += 1
    first = max(first, 1)
    ends = after + np.flatnonzero(spans.ids[after : np.searchsorted(spans.start, turn_end)] == ends_turn)
    end = int(ends[0]) if len(ends) else None
    body = Body(_inside(spans, body_from, after, content), body_from, end)
    return (first, max(first, after if end is None else end + 1)), body


def _end_of_the_last_turn(spans: TokenSpans, content: Piece | None) -> int | None:
    """Find the id that ends the turn: the first special one of such a role, else the first special one."""
    assert content
    after = int(np.searchsorted(spans.start, content[1]))
    special = spans.ids[after:][spans.special[after:]].tolist()
    ends = [token for token in special if END_ROLES & spans.view.special[token].roles]
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
    if student.chat is not None and tokenize_rows(student, [_PROBE], "chat")[0].bodies[-1].end is None:
        notes.append(
            f"the chat template of the student {student.view.name} ends no turn with a special token: "
            "it will not learn where to stop"
        )
    return notes
