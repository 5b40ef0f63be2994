"""Greedy continuations of held-out prompts: agreement with the teacher's, likelihood under the teacher, repetition.

Texts are compared, not tokens: teacher and student have different tokenizers.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

from rapidfuzz.distance import Prefix

from cdm_toolkit.compare.types import NOTHING, Continuation, Measured
from cdm_toolkit.evaluation.bpb import Passage, passage_bits
from cdm_toolkit.evaluation.evaluate import Subject
from cdm_toolkit.evaluation.generation import GenerationSettings, generate_ids, spelled
from cdm_toolkit.kd.rows import Row

Texts = Mapping[str, tuple[Continuation, ...]]
"""By kind of text."""
GRAM = 4
"""Words of a sequence that may be repeated."""


def continue_rows(subject: Subject, rows: Mapping[str, Sequence[Row]], new_tokens: int) -> Texts:
    """Let a model go on from the context of each row, greedily, for at most `new_tokens` of its tokens."""
    contexts = [context(row) for of_kind in rows.values() for row in of_kind]
    said = iter(generate_ids(subject, contexts, GenerationSettings(max_new_tokens=new_tokens)))

    def after(row: Row) -> Continuation:
        ids = next(said)
        text = whole_characters(spelled(subject.view, ids))
        return Continuation(row.number, context(row), text, is_cut=len(ids) == new_tokens)

    return {kind: tuple(map(after, of_kind)) for kind, of_kind in rows.items()}


def context(row: Row) -> str:
    """Give what a model reads before it goes on: the prompt as in training, or the first half of a text without one.

    >>> context(Row(1, "1 + 1", "2")), context(Row(1, "", "one two three four"))
    ('1 + 1\\n', 'one two')
    """
    if row.prompt:
        return row.text[: -len(row.completion)]
    words = row.completion[: len(row.completion) // 2].rsplit(maxsplit=1)
    return words[0] if words else row.completion


def whole_characters(said: bytes) -> str:
    """Decode what a model said without a last character that was cut.

    >>> whole_characters("é".encode() + "é".encode()[:1])
    'é'
    """
    return getincrementaldecoder("utf-8")("replace").decode(said)


def measure(texts: Texts, teacher_texts: Texts, teacher: Subject) -> dict[str, Measured]:
    """Measure continuations beside the teacher's of the same rows: sums that `Measured` has for these alone."""
    written = [each for each in chain.from_iterable(texts.values()) if each.text]
    passages = [Passage(each.prompt + each.text, len(each.prompt.encode())) for each in written]
    bits = {id(written[found.passage]): found.bits for found in passage_bits(teacher, passages)}
    return {
        kind: Measured.sum(
            _measured(each, other, bits.get(id(each), 0.0))
            for each, other in zip(of_kind, teacher_texts[kind], strict=True)
        )
        for kind, of_kind in texts.items()
    }


def _measured(text: Continuation, teacher: Continuation, bits: float) -> Measured:
    agreed, compared = agreement(text, teacher)
    repeated, grams = repetition(text.text)
    return replace(
        NOTHING,
        agreed_bytes=agreed,
        compared_bytes=compared,
        written_bytes=len(text.text.encode()),
        written_bits=bits,
        repeated_grams=repeated,
        grams=grams,
        ended_texts=int(not text.is_cut),
        texts=1,
    )


def agreement(text: Continuation, teacher: Continuation) -> tuple[int, int]:
    """Count the bytes that both have in common from the beginning, and those that could have been.

    The latter are as many as the shorter of the texts that were cut at the limit of tokens has, since nobody knows how
    it would have gone on; of texts that both models ended, as many as the longer has, and one for the end.

    >>> cut, ended = (lambda said: Continuation(1, "", said, True)), (lambda said: Continuation(1, "", said, False))
    >>> agreement(cut("abc"), cut("abdef")), agreement(ended("ab"), cut("abdef")), agreement(ended(""), ended(""))
    ((2, 3), (2, 5), (1, 1))
    """
    said, other = text.text.encode(), teacher.text.encode()
    common = Prefix.similarity(said, other)
    cut = [len(each.text.encode()) for each in (text, teacher) if each.is_cut]
    if cut:
        return min(common, *cut), min(cut)
    return common + (said == other), max(len(said), len(other)) + 1


def repetition(text: str) -> tuple[int, int]:
    """Count the sequences of four words that came before in a text, and all of them.

    >>> repetition("a b c d a b c d a")
    (2, 6)
    """
    words = text.split()
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)
