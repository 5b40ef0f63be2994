"""Pairs of tokenizers: alignments of texts, batches of rows, and what cannot be a pair."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from cdm_toolkit.errors import (
    BadOption,
    BadRow,
    CdmError,
    NothingToTrain,
    UnsupportedTokenizer,
)
from cdm_toolkit.kd import ExactMatch, TokenizerPair, collate

from .conftest import Side

PROMPT, ANSWER = "How many apples are left?", "There are 12 apples, so 5 + 7 = 12."
MESSAGES = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def changed(tokenizer: Any, **attributes: str | None) -> Any:
    """Give a copy with other special tokens, or another template."""
    made = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def test_is_what_its_tokenizers_are(two: TokenizerPair, same: TokenizerPair, student: Side) -> None:
    assert (two.name_t, two.name_s) == ("teacher", "student")
    assert two.vocab_s == len(student.tokenizer)
    assert not two.same_tokenizer
    assert same.same_tokenizer
    assert two.fingerprint != same.fingerprint
    assert repr(two) == "TokenizerPair('teacher' → 'student')"


def test_the_tokenizers_are_left_as_they_are(teacher: Side, student: Side) -> None:
    before = [each.tokenizer.backend_tokenizer.to_str() for each in (teacher, student)]
    TokenizerPair(teacher.tokenizer, student.tokenizer).collate([{"text": ANSWER}])
    assert [each.tokenizer.backend_tokenizer.to_str() for each in (teacher, student)] == before
    assert teacher.tokenizer(ANSWER)["input_ids"]


def test_aligns_a_text(two: TokenizerPair, teacher: Side, student: Side) -> None:
    found = two.align(ANSWER)
    assert found.t.ids.tolist() == teacher.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    assert found.s.ids.tolist() == student.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    groups = found.alignment.groups
    assert len(groups) > 5
    for t0, t1, s0, s1 in groups.tolist():
        assert (found.t.start[t0], found.t.end[t1 - 1]) == (found.s.start[s0], found.s.end[s1 - 1])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "completion": ANSWER},
        {"question": PROMPT, "answer": ANSWER, "more": 1},
        {"messages": MESSAGES},
    ],
)
def test_rows_with_a_prompt_are_one_batch(
    two: TokenizerPair, teacher: Side, student: Side, row: dict[str, Any]
) -> None:
    batch = two.collate([row])
    (side,) = batch.teachers
    assert student.tokenizer.decode(batch.labels[:-1]) == ANSWER
    assert batch.labels[-1] == student.tokenizer.eos_token_id
    assert student.tokenizer.decode(batch.student["input_ids"][0, 1:-1]) == f"{PROMPT}\n{ANSWER}"
    assert teacher.tokenizer.decode(batch.teacher["input_ids"][0, 1:-1]) == f"{PROMPT}\n{ANSWER}"
    assert teacher.tokenizer.decode(side.next_ids[:-1]) == ANSWER
    assert (side.pair, side.names) == (two.fingerprints, ("teacher", "student"))


def test_a_text_is_learned_as_a_whole(two: TokenizerPair, student: Side) -> None:
    batch = two.collate([{"text": ANSWER}])
    assert student.tokenizer.decode(batch.labels[:-1]) == ANSWER
    assert len(batch.labels) == batch.student["input_ids"].shape[1] - 1


def test_each_side_reads_a_chat_in_its_own_template(teacher: Side, student: Side) -> None:
    other = TEMPLATE.replace(": ", " says ")
    pair = TokenizerPair(
        changed(teacher.tokenizer, chat_template=other), changed(student.tokenizer, chat_template=TEMPLATE)
    )
    for row in ({"messages": MESSAGES}, {"prompt": PROMPT, "completion": ANSWER}):
        batch = pair.collate([row], template="chat")
        read = [
            side.tokenizer.decode(inputs["input_ids"][0])
            for side, inputs in ((student, batch.student), (teacher, batch.teacher))
        ]
        assert read[0].startswith(f"user: {PROMPT}\nassistant: {ANSWER}")
        assert read[1].startswith(f"user says {PROMPT}\nassistant says {ANSWER}")
        assert student.tokenizer.decode(batch.labels).strip().startswith(ANSWER)
        assert len(batch.labels) < batch.student["input_ids"].numel()
    found = pair.align_chat(MESSAGES)
    assert len(found.alignment.groups) > 10


def test_rows_are_padded_and_numbered(two: TokenizerPair) -> None:
    rows = [{"text": ANSWER}, {"prompt": PROMPT, "completion": ANSWER}, {"text": "5 + 7"}]
    batch = two.collate(rows)
    assert batch.rows == (1, 2, 3)
    assert batch.student["input_ids"].shape[0] == batch.teacher["input_ids"].shape[0] == 3
    assert sum(batch.teachers[0].groups_per_row) == batch.teachers[0].groups
    alone = [two.collate([row]) for row in rows]
    assert batch.labels.tolist() == [label for one in alone for label in one.labels.tolist()]
    assert batch.teachers[0].next_ids.tolist() == [
        token for one in alone for token in one.teachers[0].next_ids.tolist()
    ]


def test_rows_with_nothing_to_learn_are_left_out(two: TokenizerPair) -> None:
    rows = [
        {"prompt": PROMPT, "completion": ""},
        {"text": ANSWER},
        {"prompt": "word " * 500, "completion": ANSWER},
        {"prompt": PROMPT, "completion": "12"},
    ]
    assert two.collate(rows, max_length=200).rows == (2, 4)
    with pytest.raises(NothingToTrain, match="1 of 2 rows have no completion, 1 have none of it within"):
        two.collate([rows[0], rows[2]], max_length=200)
    with pytest.raises(NothingToTrain):
        two.collate([])
    with pytest.raises(BadOption, match="`rows` is 'a mapping of columns'; give a list of rows"):
        two.collate({"prompt": ["a"], "completion": ["b"]})


def test_pairs_and_methods_can_be_pickled_and_copied(two: TokenizerPair) -> None:
    again = pickle.loads(pickle.dumps(two))
    assert again.fingerprints == two.fingerprints
    assert torch.equal(again.collate([{"text": "12 cats"}]).labels, two.collate([{"text": "12 cats"}]).labels)
    assert copy.deepcopy(ExactMatch(two)).top_k == ExactMatch(two).top_k


def test_long_rows_are_cut_on_both_sides(two: TokenizerPair, teacher: Side, student: Side) -> None:
    batch = two.collate([{"text": ANSWER * 20}], max_length=40)
    texts = [
        side.tokenizer.decode(inputs["input_ids"][0, 1:])
        for side, inputs in ((student, batch.student), (teacher, batch.teacher))
    ]
    assert texts[0] == texts[1]
    assert max(batch.student["input_ids"].shape[1], batch.teacher["input_ids"].shape[1]) <= 40


def test_several_pairs_of_one_student(two: TokenizerPair, same: TokenizerPair, student: Side) -> None:
    own = TokenizerPair(student.tokenizer, student.tokenizer)
    batch = collate([two, own], [{"text": ANSWER}])
    assert [side.pair for side in batch.teachers] == [two.fingerprints, own.fingerprints]
    assert batch.of_teacher(1).teachers == batch.teachers[1:]
    with pytest.raises(BadOption, match="the students of the pairs is 'student, other'; give pairs with one"):
        collate([two, same], [{"text": ANSWER}])
    with pytest.raises(BadOption, match=r"`pairs` is \[\]; give one pair for each teacher"):
        collate([], [{"text": ANSWER}])


def test_tables_are_built_once_and_shared(two: TokenizerPair) -> None:
    assert two.exact_map() is two.exact_map()
    assert two.spellings() is two.spellings()
    assert two.neighbours(max_edit_distance=0.2) is two.neighbours(max_edit_distance=0.2)
    assert two.neighbours(max_edit_distance=0.2) is not two.neighbours(max_edit_distance=0.3)
    assert (two.exact() >= 0).sum() > 300
    assert len(two.exact()) == two.vocab_t


# What cannot be


def one_line(error: Exception) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def test_slow_tokenizers_are_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(UnsupportedTokenizer) as caught:
        TokenizerPair(ByT5Tokenizer(), ByT5Tokenizer(), names=("byt5", "byt5"))
    assert one_line(caught.value).startswith("the tokenizer 'byt5' cannot be read, ")


def test_special_tokens_that_clash_are_refused(teacher: Side) -> None:
    begins = changed(teacher.tokenizer, bos_token="<|im_start|>", eos_token="<|endoftext|>")
    ends = changed(teacher.tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    with pytest.raises(CdmError) as caught:
        TokenizerPair(begins, ends, names=("a", "b"))
    assert one_line(caught.value) == (
        "the special tokens of a and b clash, <|endoftext|> is the eos_token of the teacher and the bos_token of "
        "the student; set the student's eos_token and bos_token to what its model was trained with"
    )
    both = changed(teacher.tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    TokenizerPair(begins, both)  # one token for both, as GPT-2 has it
    TokenizerPair(both, ends)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p"}, "the batch, row 2: it has prompt; give each row prompt and completion,"),
        ({"text": 5}, "the batch, row 2: text is int, not a string; make text a string"),
        ("text", "the batch, row 2: it is not a JSON object"),
        ({"messages": MESSAGES[:1]}, "the batch, row 2: no message is an answer of the assistant"),
    ],
)
def test_rows_that_cannot_be_read_are_named(two: TokenizerPair, row: Any, problem: str) -> None:
    with pytest.raises(BadRow) as caught:
        two.collate([{"text": ANSWER}, row])
    assert one_line(caught.value).startswith(problem)


def test_a_tokenizer_without_a_template_has_no_chats(teacher: Side, student: Side) -> None:
    pair = TokenizerPair(
        changed(teacher.tokenizer, chat_template=TEMPLATE), changed(student.tokenizer, chat_template=None)
    )
    for read in (
        lambda: pair.collate([{"messages": MESSAGES}], template="chat"),
        lambda: pair.align_chat(MESSAGES),
    ):
        with pytest.raises(UnsupportedTokenizer) as caught:
            read()
        assert "it has no chat template" in one_line(caught.value)
