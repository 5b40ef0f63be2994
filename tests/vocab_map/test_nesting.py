"""Students whose tokens are parts of the teacher's, and why others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdm_toolkit.errors import SourceNotFound
from cdm_toolkit.hub.cut_vocabulary import load_cut
from cdm_toolkit.hub.tokenizers import Loaded
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.nesting import nesting_fault
from cdm_toolkit.vocab_map.spelling import spelled


def cut(name: str, entries: int) -> Loaded:
    try:
        return load_cut(name, entries)
    except SourceNotFound as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "entries"), [("smollm2", 900), ("smollm2", 32_000), ("gpt2", 8_000)])
def test_first_merges_nest(
    name: str, entries: int, real_view: Callable[[str], TokenizerView], multilingual: list[str]
) -> None:
    """Not in name alone: the student's tokens of a text are those of the teacher's tokens, one after the other."""
    teacher, student = real_view(name), cut(name, entries).view
    assert nesting_fault(teacher, student) == ""
    ways = spelled(teacher, student, 64)
    for text in [*multilingual, "  \n\n\t x=  3;   don't we'll  12345  \r\n"]:
        one_by_one = [i for t in teacher.encode(text).ids for i in ways[t].tolist() if i >= 0]
        assert one_by_one == list(student.encode(text).ids)


def test_merges_in_several_ways_nest(real_view: Callable[[str], TokenizerView]) -> None:
    """Qwen2's merge 229 is of `u` and `rn`, which a student of 32,000 entries does not have."""
    assert nesting_fault(real_view("qwen2"), cut("qwen2", 32_000).view) == ""


def test_a_tokenizer_nests_in_itself(smollm2_view: TokenizerView) -> None:
    assert nesting_fault(smollm2_view, smollm2_view) == ""


def test_why_others_do_not(real_view: Callable[[str], TokenizerView]) -> None:
    smollm2, gpt2, mistral = map(real_view, ("smollm2", "gpt2", "mistral"))
    small = cut("smollm2", 900).view
    assert nesting_fault(mistral, gpt2) == "mistral is SentencePiece BPE, not byte-level BPE"
    assert nesting_fault(smollm2, gpt2) == "gpt2 splits a text in another way than smollm2"
    assert nesting_fault(small, smollm2) == "merge 649 of smollm2 is in + k, that of smollm2 cut to 900 none"
