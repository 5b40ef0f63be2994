"""Greedy continuations: what is compared of two texts, and what a model says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.compare.continuations import (
    agreement,
    context,
    continue_rows,
    measure,
    repetition,
    whole_characters,
)
from cdm_toolkit.compare.table import MEASURES
from cdm_toolkit.compare.types import NOTHING, Continuation
from cdm_toolkit.evaluation.bpb import Passage, passage_bits
from cdm_toolkit.evaluation.evaluate import load_subject
from cdm_toolkit.kd.rows import Row

ROWS = {
    "sums": [Row(1, "What is 17 + 25?", "It is 42."), Row(2, "größe", "漢字")],
    "manual": [Row(3, "", "The first half of a text is what is read of it.")],
}
TEXTS = st.builds(
    Continuation, st.just(1), st.just(""), st.text(st.sampled_from("ab é"), max_size=8), st.booleans()
)


@given(TEXTS, TEXTS)
def test_agreement_is_a_share_and_has_no_direction(text: Continuation, teacher: Continuation) -> None:
    agreed, compared = agreement(text, teacher)
    assert 0 <= agreed <= compared
    assert agreement(teacher, text) == (agreed, compared)
    assert agreement(text, text)[0] == agreement(text, text)[1]


@pytest.mark.parametrize(
    ("said", "others", "agreed"),
    [
        (("one two", True), ("one too long", True), (5, 7)),
        (("one two", True), ("one two long", True), (7, 7)),
        (("one", False), ("one two long", True), (3, 12)),
        (("", False), ("one", False), (0, 4)),
        (("one", False), ("one", False), (4, 4)),
    ],
)
def test_texts_are_compared_as_far_as_both_go(
    said: tuple[str, bool], others: tuple[str, bool], agreed: tuple[int, int]
) -> None:
    assert agreement(Continuation(1, "", *said), Continuation(1, "", *others)) == agreed


def test_repetition_counts_sequences_of_four_words() -> None:
    assert repetition("so it goes") == (0, 0)
    assert repetition("so it goes on") == (0, 1)
    assert repetition("no " * 10) == (6, 7)


def test_a_context_is_the_prompt_or_the_first_half() -> None:
    assert context(ROWS["sums"][0]) == "What is 17 + 25?\n"
    assert context(ROWS["manual"][0]) == "The first half of a"
    assert context(Row(1, "", "x")) == "x"


def test_half_a_character_is_left_out_and_a_wrong_one_is_shown() -> None:
    assert whole_characters("漢".encode()[:2]) == ""
    assert whole_characters(b"a\xff b") == "a\ufffd b"


def test_models_go_on_and_are_measured(small_models: Path) -> None:
    teacher, student = (load_subject(str(small_models / name), "cpu") for name in ("teacher", "student"))
    own, texts = continue_rows(teacher, ROWS, 6), continue_rows(student, ROWS, 6)
    assert continue_rows(student, ROWS, 6) == texts
    assert [(each.row, each.prompt) for each in texts["sums"]] == [(1, "What is 17 + 25?\n"), (2, "größe\n")]
    found = measure(texts, own, teacher)
    for kind, of_kind in texts.items():
        written = [each for each in of_kind if each.text]
        passages = [Passage(each.prompt + each.text, len(each.prompt.encode())) for each in written]
        bits = sum(each.bits for each in passage_bits(teacher, passages))
        assert found[kind].written_bits == pytest.approx(bits, rel=1e-6)
        assert found[kind].written_bytes == sum(len(each.text.encode()) for each in of_kind)
        pairs = [agreement(*pair) for pair in zip(of_kind, own[kind], strict=True)]
        assert (found[kind].agreed_bytes, found[kind].compared_bytes) == tuple(
            map(sum, zip(*pairs, strict=True))
        )
    for of_kind in measure(own, own, teacher).values():
        assert of_kind.ratio("agreed_bytes", "compared_bytes") == 1.0


def test_each_kind_has_the_bits_of_its_own_texts(small_models: Path) -> None:
    """Whichever is longer: passages are scored the longest first."""
    teacher = load_subject(str(small_models / "teacher"), "cpu")
    short, long = (
        Continuation(1, "a\n", said, True) for said in ("bc", "What is read of it, and more. " * 3)
    )
    texts = {"short": (short,), "long": (long,)}
    found = measure(texts, texts, teacher)
    for kind, (text,) in texts.items():
        (alone,) = passage_bits(teacher, [Passage(text.prompt + text.text, len(text.prompt))])
        assert found[kind].written_bits == pytest.approx(alone.bits, rel=1e-6)


def test_nothing_said_is_no_figure() -> None:
    ratios = [measure.ratio for measure in MEASURES if measure.of_continuations]
    assert [NOTHING.ratio(*ratio) for ratio in ratios] == [None] * 4
