"""Rows of which one side's ids are given: the ids stay, the other sides read the text that they spell."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from cdm_toolkit.errors import BadOption, DoesNotSpell, SourceNotFound, UnknownTokenId
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd import TokenizerPair
from cdm_toolkit.kd.aligned_rows import align_groups, truncate_aligned
from cdm_toolkit.kd.given_ids import row_of_chat_ids, row_of_ids
from cdm_toolkit.kd.rows import GivenIds, Row, RowFault, row_of, rows_fingerprint
from cdm_toolkit.kd.tokenized_rows import TokenizedRow, TokenizerSide, tokenize_rows, tokenizer_side

PAIRS = [("smollm2", "qwen2"), ("llama3", "mistral"), ("mistral", "gpt2"), ("qwen2", "smollm2")]


@cache
def side(name: str) -> TokenizerSide:
    try:
        loaded = load_tokenizer(name)
    except SourceNotFound as error:
        pytest.skip(str(error))
    return tokenizer_side(loaded.tokenizer, loaded.view)


def tokenized(of: TokenizerSide, row: Row) -> TokenizedRow:
    return tokenize_rows(of, [row], "none")[0]


def same(one: TokenizedRow, two: TokenizedRow) -> bool:
    arrays = [(one.ids, two.ids), (one.turns, two.turns)]
    for a, b in zip(one.bodies, two.bodies, strict=True):
        assert (a.start, a.end, a.spans.text_bytes) == (b.start, b.end, b.spans.text_bytes)
        arrays += [(a.spans.start, b.spans.start), (a.spans.end, b.spans.end)]
    return all(np.array_equal(*both) for both in arrays)


@pytest.mark.parametrize(("of", "other"), PAIRS)
def test_ids_of_a_text_give_the_row_of_the_text(of: str, other: str, multilingual: list[str]) -> None:
    given, read = side(of), side(other)
    for number, text in enumerate(multilingual[:40], 1):
        plain = Row(number, "", text)
        own = tokenized(given, plain)
        row = row_of_ids(number, given.view, own.ids)
        if row.text != text:  # a tokenizer that normalises
            assert given.view.encode(row.text).ids.tolist() == given.view.encode(text).ids.tolist()
            continue
        assert row.ended
        assert same(tokenized(given, row), own)
        assert same(tokenized(read, row), tokenized(read, plain))


@pytest.mark.parametrize(("of", "other"), PAIRS)
def test_ids_that_the_tokenizer_would_not_choose_are_kept(of: str, other: str) -> None:
    """A model may spell a word in other tokens than its tokenizer: these are the ones that were predicted."""
    given, read = side(of), side(other)
    text = "The answer is twenty-two."
    letters = [int(i) for letter in text for i in given.view.encode(letter).ids[-1:]]
    spelled = [
        i for i in letters if (given.view.token_bytes[i] or b"").strip() or given.view.token_bytes[i] == b" "
    ]
    ids = given.framed(np.array(spelled, np.int32), ended=True)
    row = row_of_ids(1, given.view, ids)
    assert tokenized(given, row).ids.tolist() == ids.tolist()
    t, s = tokenized(given, row), tokenized(read, row)
    groups = align_groups(t, s)
    assert len(groups) == len(s.bodies[0].spans) + 1  # each token of the student ends where a letter does
    for t0, t1, s0, s1 in groups[:-1].tolist():
        spans_t, spans_s = t.bodies[0].spans, s.bodies[0].spans
        first_t, first_s = t0 - t.bodies[0].start, s0 - s.bodies[0].start
        assert spans_t.end[first_t + t1 - t0 - 1] == spans_s.end[first_s + s1 - s0 - 1]


def test_either_side_may_be_the_given_one() -> None:
    given, read = side("qwen2"), side("smollm2")
    ids = tokenized(given, Row(1, "", "Wie geht es dir? 你好")).ids
    row = row_of_ids(1, given.view, ids)
    there = align_groups(tokenized(given, row), tokenized(read, row))
    back = align_groups(tokenized(read, row), tokenized(given, row))
    assert np.array_equal(there, back[:, [2, 3, 0, 1]])


def test_what_was_cut_teaches_no_end() -> None:
    given, read = side("llama3"), side("smollm2")
    whole = tokenized(given, Row(1, "", "One two three four")).ids
    row = row_of_ids(1, given.view, whole[:-1])
    t, s = tokenized(given, row), tokenized(read, row)
    assert not row.ended
    assert t.ids.tolist() == whole[:-1].tolist()
    assert t.bodies[0].end is s.bodies[0].end is None
    assert s.ids[-1] != read.eos
    assert s.turns.tolist() == [[1, len(s.ids)]]


def test_a_text_ends_before_half_a_character() -> None:
    given = side("gpt2")
    ids = given.view.encode("good 🍎").ids
    row = row_of_ids(1, given.view, ids[:-1])
    assert (row.text, row.ended) == ("good", False)
    assert tokenized(given, row).ids.tolist() == ids[:1].tolist()
    assert row_of_ids(1, given.view, ids[1:2]).text == ""


def test_padding_is_no_end() -> None:
    view = side("llama3").view
    pad = next(i for i, token in view.special.items() if "finetune_right_pad" in token.content)
    ids = view.encode("One two").ids
    row = row_of_ids(1, view, np.append(ids, pad).astype(np.int32))
    assert row.given is not None
    assert not row.ended
    assert list(row.given.ids) == ids.tolist()


def test_the_first_token_without_one_before_it_has_no_group() -> None:
    given, read = side("qwen2"), side("smollm2")
    row = row_of_ids(1, given.view, given.view.encode("Hello there").ids)
    t, s = tokenized(given, row), tokenized(read, row)
    aligned, _ = truncate_aligned(1, s, [(t, align_groups(t, s))], 100)
    assert aligned.turns.tolist() == [[1, 3]]  # learned from the data
    assert aligned.teachers[0].groups.tolist() == [[1, 2, 2, 3]]


def test_turns_say_what_is_learned_on_both_sides() -> None:
    given, read = side("smollm2"), side("qwen2")
    own = tokenized(given, Row(1, "How much is 2 + 2?", "It is 4."))
    row = row_of_ids(1, given.view, own.ids, own.turns)
    assert same(tokenized(given, row), own)
    assert row.ended
    spans = tokenized(read, row).bodies[0].spans
    first, end = (int(each) - side("qwen2").shift for each in tokenized(read, row).turns[0])
    assert spans.text_bytes[spans.start[first] :] == b"It is 4."
    assert end == len(spans) + 1
    part = row_of_ids(1, given.view, own.ids, own.turns - np.array([[0, 2]], np.int32))
    assert not part.ended
    assert tokenized(read, part).ids[-1] != side("qwen2").eos


def test_special_tokens_within_are_read_by_their_own_side_alone() -> None:
    given, read = side("smollm2"), side("qwen2")
    eos = given.eos
    ids = np.concatenate([given.view.encode("One.").ids, [eos], given.view.encode(" Two.").ids]).astype(
        np.int32
    )
    row = row_of_ids(1, given.view, ids)
    assert row.text == "One. Two."
    t, s = tokenized(given, row), tokenized(read, row)
    assert t.ids.tolist() == ids.tolist()
    assert not np.isin(s.ids[1:], list(read.view.special)).any()
    assert all(eos not in t.ids[t0:t1] for t0, t1, *_ in align_groups(t, s).tolist())


def test_rows_in_files_may_have_given_ids() -> None:
    given = side("smollm2")
    row = row_of_ids(3, given.view, tokenized(given, Row(3, "", "One two")).ids)
    assert row.given is not None
    line = json.dumps({"text": row.text, "given": row.given.as_dict(), "ended": row.ended})
    found = row_of(3, json.loads(line))
    assert same(tokenized(given, found), tokenized(given, row))
    assert rows_fingerprint([found]) == rows_fingerprint([row])
    for other in (replace(row, given=None), replace(row, ended=False)):
        assert rows_fingerprint([other]) != rows_fingerprint([row])
    with pytest.raises(RowFault, match="given is no record of ids"):
        row_of(1, {"text": "One", "given": {"ids": [1]}})
    with pytest.raises(RowFault, match="ended is 'no'"):
        row_of(1, {"text": "One", "ended": "no"})


def test_an_answer_that_a_student_has_sampled_keeps_its_ids() -> None:
    """The prompt as its template writes it, then what it sampled: the teacher reads the message's text."""
    student, teacher = side("smollm2"), side("qwen2")
    if student.chat is None or teacher.chat is None:
        pytest.skip("no chat templates here")
    plain = tokenize_rows(student, [Row(1, "How much is 2 + 2?", "It is 4.")], "chat")[0]
    (first, end), view = plain.turns[0].tolist(), student.view
    sampled = [int(i) for letter in "It is 4." for i in view.encode(letter).ids]
    ids = np.concatenate([plain.ids[:first], sampled, plain.ids[end - 1 :]]).astype(np.int32)
    given = GivenIds(view.fingerprint, tuple(ids.tolist()), ((first, len(ids)),))
    row = Row(1, "How much is 2 + 2?", "It is 4.", given=given)
    s, t = (tokenize_rows(each, [row], "chat")[0] for each in (student, teacher))
    assert s.ids.tolist() == ids.tolist()
    assert s.bodies[0].spans.text_bytes == t.bodies[0].spans.text_bytes == b"It is 4."
    groups = align_groups(t, s)
    assert groups[-1].tolist() == [t.bodies[0].end, t.bodies[0].end + 1, len(ids) - 1, len(ids)]
    cut = replace(row, ended=False)
    assert tokenize_rows(teacher, [cut], "chat")[0].bodies[0].end is None


def test_a_template_that_does_not_suit_the_ids_is_refused() -> None:
    given = side("smollm2")
    row = row_of_ids(1, given.view, given.view.encode("One two").ids)
    with pytest.raises(BadOption, match="give none, since row 1 is a text without a prompt"):
        tokenize_rows(given, [row], "chat")
    if given.chat is None:
        pytest.skip("no chat template here")
    chat = given.chat.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]).text
    found = row_of_chat_ids(1, given.view, given.view.encode(chat).ids)
    assert found is not None
    with pytest.raises(BadOption, match="give chat: row 1 is a chat, as a template wrote it"):
        tokenized(given, found)


def test_ids_of_another_text_are_refused() -> None:
    given = side("smollm2")
    row = row_of_ids(1, given.view, given.view.encode("One two").ids)
    with pytest.raises(DoesNotSpell):
        tokenized(given, replace(row, completion="One three"))
    with pytest.raises(UnknownTokenId):
        row_of_ids(1, given.view, np.array([1, given.view.vocab_size], np.int32))


def test_a_batch_takes_rows_with_given_ids() -> None:
    pair = TokenizerPair.from_names("smollm2", "qwen2")
    ids = pair.teacher.view.encode("A cat sat on the mat.").ids[1:]
    batch = pair.collate([row_of_ids(1, pair.teacher.view, ids)])
    assert batch.teacher["input_ids"][0].tolist() == ids.tolist()
