"""Rows that are held out: which, and what their labels spell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.distill.dataset import build_dataset
from cdm_toolkit.distill.heldout import SomeRows, Spelled, TextKeys, chosen_share
from cdm_toolkit.errors import BadRow
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.rows import Message, Row, row_of
from cdm_toolkit.kd.tokenized_rows import tokenizer_side

ROWS = [Row(n, f"What is {n}?", f"It is {n * n}, naïve as it is.") for n in range(1, 401)]
keys = st.lists(st.integers(0, (1 << 64) - 1), max_size=30).map(lambda found: np.array(found, np.uint64))


@given(keys, keys, st.floats(1e-6, 1 - 1e-6))
def test_a_row_is_chosen_whatever_the_others_are(one, two, share) -> None:
    both = chosen_share(np.concatenate((one, two)), share, None)
    assert both.tolist() == [*chosen_share(one, share, None), *chosen_share(two, share, None)]


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 10))
def test_a_limit_is_kept_and_equal_texts_stay_together(found, limit) -> None:
    given = np.array(found, np.uint64)
    chosen = chosen_share(given, 0.5, limit)
    assert chosen.sum() <= limit
    assert not set(given[chosen].tolist()) & set(given[~chosen].tolist())


def test_about_the_share_of_texts_is_chosen() -> None:
    found = TextKeys.of(ROWS)
    chosen = chosen_share(found.keys, 0.1, None)
    assert 20 <= chosen.sum() <= 60
    assert (chosen_share(found.keys, 0.2, None) | ~chosen).all(), "a larger share has the smaller one"
    again = TextKeys.of([*ROWS[::-1], Row(401, "more", "rows")])
    assert set(again.keys[:400].tolist()) == set(found.keys.tolist())


def test_texts_that_differ_in_blanks_or_shape_are_one() -> None:
    same = [
        Row(1, "a b", "c d"),
        Row(2, " a  b", "c\td\n"),
        Row(3, "", "a b c d"),
        Row(4, "a b", "c d", (Message("user", "a b"), Message("assistant", "c d"))),
        Row(5, "a b", "c  d."),
    ]
    first, *others, last = TextKeys.of(same).keys.tolist()
    assert {first, *others} == {first} != {last}


def test_a_row_that_is_trained_on_is_named() -> None:
    trained, held_out = TextKeys.of(ROWS), TextKeys.of([Row(7, "new", "text"), ROWS[20], ROWS[30]])
    with pytest.raises(BadRow) as caught:
        held_out.refuse_in(trained, ("held.jsonl", "rows.jsonl"))
    said = (
        "held.jsonl, row 21: it is trained on, as row 21 of rows.jsonl, and so are 1 more; take them out of"
    )
    assert str(caught.value).startswith(said)
    TextKeys.of([Row(1, "new", "text")]).refuse_in(trained, ("held.jsonl", "rows.jsonl"))


@pytest.mark.parametrize("name", ["smollm2", "mistral", "gpt2"])
def test_labels_spell_the_completion(name: str) -> None:
    """The bytes of all labels but the end are those of the completion, where no token lies across its start."""
    loaded = load_tokenizer(name)
    side = tokenizer_side(loaded.tokenizer, loaded.view)
    rows = [*ROWS[:20], Row(500, "", "one two"), Row(501, "日本", "こんにちは 👍🏽")]
    features, _ = build_dataset(rows, side)
    spelled = Spelled.of(side, rows, features, "none")
    assert spelled.bytes == sum(len(row.completion.encode()) for row in rows)
    for row in features:
        ids, marks = row.student_ids[row.label_from :], spelled.at([row.row])
        assert marks.tolist() == [token != side.eos for token in ids.tolist()]
    cut, _ = build_dataset(ROWS[:20], side, max_length=12)
    ids = [token for row in cut for token in row.student_ids[row.label_from :].tolist() if token != side.eos]
    text = b"".join(loaded.view.token_bytes[token] for token in ids)
    assert Spelled.of(side, ROWS, cut, "none").bytes == len(text) < spelled.bytes


def test_labels_of_a_chat_spell_the_message_alone() -> None:
    loaded = load_tokenizer("smollm2")
    side = tokenizer_side(loaded.tokenizer, loaded.view)
    rows = [*ROWS[:5], row_of(6, {"messages": [message for row in ROWS[5:8] for message in row.chat]})]
    features, _ = build_dataset(rows, side, template="chat")
    spelled = Spelled.of(side, rows, features, "chat")
    assert spelled.bytes == sum(len(row.completion.encode()) for row in ROWS[:8]), "of all three turns"
    assert [spelled.at([row.row]).sum() for row in features] == [
        row.labels - len(row.turns) for row in features
    ]


def test_some_rows_are_those_of_the_data_set() -> None:
    loaded = load_tokenizer("smollm2")
    features, _ = build_dataset(ROWS[:9], tokenizer_side(loaded.tokenizer, loaded.view))
    some = SomeRows(features, np.array([1, 4, 7]))
    assert [row.row for row in some] == [row.row for row in some[:]] == some.numbers.tolist() == [2, 5, 8]
    assert some.lengths.tolist() == [row.length for row in some]
    assert some.label_counts.tolist() == [row.labels for row in some]
