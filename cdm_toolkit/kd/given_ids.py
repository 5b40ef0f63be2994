"""Rows of which one side's ids are given: what they spell, and what of it other sides learn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int32

from cdm_toolkit.kd.rows import ROLES, GivenIds, Learn, Message, Row, RowFault
from cdm_toolkit.kd.tokenized_rows import END_ROLES, Turns
from cdm_toolkit.tokdiff.spans import TokenSpans, spell_ids
from cdm_toolkit.tokdiff.view import TokenizerView


def row_of_ids(
    number: int, view: TokenizerView, ids: Int32[np.ndarray, " time"], turns: Turns | None = None
) -> Row:
    """Make a row of the text that ids spell; their own side keeps the ids, the others encode the text.

    All of it is learned, or the tokens in `turns`. The special token after the text is kept where it ends a text or a
    turn, else the text counts as cut; so it does before the first byte that is no character. Special tokens within the
    text stay in the ids, and are no part of what the other sides read. UnknownTokenId.
    """
    spans = spell_ids(view, ids)
    text, after = _characters(spans)
    ends = after < len(ids) and bool(_roles(view, int(ids[after])) & END_ROLES)
    kept = ids[: after + ends].astype(np.int32)
    if not text:
        return Row(number, "", "")
    size = len(text.encode())
    if turns is None:
        first = int(np.argmax(~spans.special))
        whole = np.array([[max(first, 1), len(kept)]], np.int32)
        return _row(number, text, _given(view, kept, whole, ((0, size),)), ends)
    turns = np.minimum(turns, len(kept)).astype(np.int32)
    turns = turns[turns[:, 0] < turns[:, 1]]
    pieces = tuple(
        (int(spans.start[first]), min(int(spans.end[end - 1]), size)) for first, end in turns.tolist()
    )
    if not pieces:
        return Row(number, "", "")
    ended = ends and int(turns[-1, 1]) == len(kept)
    return _row(number, text, _given(view, kept, turns, pieces), ended)


def row_of_sample(
    row: Row,
    view: TokenizerView,
    prompt: Int32[np.ndarray, " prompt"],
    ids: Int32[np.ndarray, " time"],
    markers: re.Pattern[str] | None = None,
) -> Row:
    """Make the row of what a model has sampled after the prompt of `row`: its ids stay as they were sampled.

    Its text is the completion, or the last message, for the other sides to read. It has an end where a special token
    that ends a text or a turn follows the text, and is cut before the first byte that is no character, and before what
    would be a special token of another side (`markers`). Special tokens within the text are no part of it.
    UnknownTokenId.
    """
    spans = spell_ids(view, np.concatenate((prompt, ids)).astype(np.int32), first=len(prompt))
    text, after = _characters(spans)
    if markers is not None and (found := markers.search(text)):
        after = int(np.searchsorted(spans.end, len(text[: found.start()].encode()), "right"))
        text = spans.text_bytes[: spans.end[after - 1] if after else 0].decode(errors="ignore")
        ended = False
    else:
        ended = after < len(ids) and bool(_roles(view, int(ids[after])) & END_ROLES)
    turn = len(prompt), len(prompt) + after + ended
    kept = np.concatenate((prompt, ids[: after + ended])).astype(np.int32)
    given = _given(view, kept, np.array([turn], np.int32))
    messages = (*row.messages[:-1], row.messages[-1]._replace(content=text)) if row.messages else ()
    return replace(row, completion=text, messages=messages, earlier=(), given=given, ended=ended)


def special_texts(views: Iterable[TokenizerView]) -> re.Pattern[str] | None:
    """Find the special tokens of tokenizers in a text; None where they have none."""
    contents = {special.content for view in views for special in view.special.values() if special.content}
    ordered = sorted(contents, key=lambda content: (-len(content), content))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _given(
    view: TokenizerView,
    ids: Int32[np.ndarray, " time"],
    turns: Turns,
    pieces: tuple[tuple[int, int], ...] = (),
) -> GivenIds:
    ranges = tuple((first, end) for first, end in turns.tolist())
    return GivenIds(view.fingerprint, tuple(ids.tolist()), ranges, pieces)


def _row(number: int, text: str, given: GivenIds, ended: bool) -> Row:
    return Row(number, prompt="", completion=text, given=given, ended=ended)


def _characters(spans: TokenSpans) -> tuple[str, int]:
    """Give the whole characters from the beginning, and the index after the last token that spells any of them."""
    size = len(spans.text_bytes)
    try:
        text = spans.text_bytes.decode()
    except UnicodeDecodeError as error:
        starts = np.append((np.frombuffer(spans.text_bytes, np.uint8)[: error.start] & 0xC0) != 0x80, True)
        ends = spans.end[spans.end <= error.start]
        size = int(ends[starts[ends]].max(initial=0))
        text = spans.text_bytes[:size].decode()
    spelling = np.flatnonzero((spans.end <= size) & ~spans.special)
    return text, int(spelling[-1]) + 1 if len(spelling) else 0


def _roles(view: TokenizerView, token_id: int) -> frozenset[str]:
    return view.special[token_id].roles if token_id in view.special else frozenset()


# Chats

CHAT_ROLES = frozenset(
    {"turn_start", "header_start", "role_user", "role_assistant", "role_system", "turn_end"}
)
"""Of special tokens that stand between the messages of a chat."""
AFTER = END_ROLES | CHAT_ROLES | {"message_end"}
"""Of special tokens that a message goes up to."""
OWN_ROLES = {"ipython": "tool"}
"""Names in templates for the roles that all templates know, beside those in `ROLES`."""


def row_of_chat_ids(
    number: int,
    view: TokenizerView,
    ids: Int32[np.ndarray, " time"],
    learned: Bool[np.ndarray, " time"] | None = None,
    *,
    learn: Learn = "all",
) -> Row | None:
    """Make a row of ids that a chat template wrote; None where no marker of a chat stands within them.

    The markers tell the messages: the other sides write them through their own templates. What is learned are the
    answers of the assistant whose tokens are all `learned`; without any the row has no completion. RowFault for
    markers without messages.
    """
    spans = spell_ids(view, ids)
    _, after = _characters(spans)
    first = int(np.argmax(~spans.special)) if after else 0
    if not any(
        _roles(view, int(token)) & CHAT_ROLES for token in ids[first:after][spans.special[first:after]]
    ):
        return None
    after += int(after < len(ids) and spans.special[after])
    read = list(_messages(view, spans, after))
    if not read:
        raise RowFault("its ids have markers of a chat, but no messages", "give a set of texts, or of chats")
    answers = [
        nth
        for nth, (message, (begin, end), is_call) in enumerate(read)
        if message.is_answer
        and not is_call
        and message.content
        and (learned is None or learned[begin:end].all())
    ]
    answers = answers if learn == "all" else answers[-1:]
    if not answers:
        return Row(number, "", "")
    messages = [message for message, *_ in read[: answers[-1] + 1]]
    turns = np.array([read[nth][1] for nth in answers], np.int32)
    return Row(
        number,
        prompt="\n".join(one.content for one in messages[:-1]),
        completion=messages[-1].content,
        messages=tuple(messages),
        earlier=tuple(answers[:-1]),
        given=_given(view, ids[: turns[-1, 1]], turns),
        ended=bool(_roles(view, int(ids[turns[-1, 1] - 1])) & END_ROLES),
    )


def _messages(
    view: TokenizerView, spans: TokenSpans, last: int
) -> Iterator[tuple[Message, tuple[int, int], bool]]:
    """Read the messages among the first `last` tokens: the tokens of each, with the one that ends it.

    The third of each says that the assistant goes on: it calls a tool.
    """
    special = {int(at): _roles(view, int(spans.ids[at])) for at in np.flatnonzero(spans.special[:last])}
    at, heard = 0, False
    while at < last:
        begun = _header(spans, special, at, last)
        if begun is not None and not heard:
            heard = True
            before = spans.text_bytes[: spans.start[at]].decode(errors="replace").strip()
            if before:  # DeepSeek's template writes the system's message so
                yield Message("system", before), (0, at), False
        if begun is None:
            at += 1
            continue
        role, begin = begun
        end = next((nth for nth in range(begin, last) if special.get(nth, frozenset()) & AFTER), last)
        while begin < end and _ends_line(view.literals[spans.ids[begin]]):
            begin += 1
        content = spans.text_bytes[spans.start[begin] : spans.end[end - 1]] if begin < end else b""
        closing = special.get(end, frozenset())
        taken = end + int(bool(closing & (END_ROLES | {"message_end"})))
        message = Message(role, content.decode(errors="replace").strip())
        yield message, (begin, taken), "message_end" in closing
        at = max(taken, at + 1)


def _ends_line(token: bytes) -> bool:
    """Tell a line feed before a message, which is the template's."""
    return b"\n" in token and not token.strip()


def _header(
    spans: TokenSpans, special: dict[int, frozenset[str]], at: int, last: int
) -> tuple[str, int] | None:
    """Read who speaks from the marker at an index, and where the message begins; None where none does."""
    roles = special.get(at, frozenset())
    named = next((role for role in roles if role.startswith("role_")), None)
    if named:
        return named.removeprefix("role_"), at + 1
    if not roles & {"turn_start", "header_start"}:
        return None
    begin = int(spans.end[at])
    if "header_start" in roles:
        close = next(
            (nth for nth in range(at + 1, last) if "header_end" in special.get(nth, frozenset())), None
        )
        if close is None:
            return None
        name, offset = spans.text_bytes[begin : spans.start[close]], int(spans.end[close])
        content = close + 1
    else:
        line = spans.text_bytes.find(b"\n", begin)
        if line < 0:
            return None
        name, offset = spans.text_bytes[begin:line], line + 1
        content = max(at + 1, int(np.searchsorted(spans.start, offset)))
        while content > at + 1 and spans.special[content - 1]:
            content -= 1
    role = name.decode(errors="replace").strip()
    return ROLES.get(role, OWN_ROLES.get(role, role)), content
