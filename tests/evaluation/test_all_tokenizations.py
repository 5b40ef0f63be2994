"""The likelihood of texts over all tokenizations: beside brute force, and of a real model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cdm_toolkit.errors import CdmError
from cdm_toolkit.evaluation.all_tokenizations import text_likelihood
from cdm_toolkit.evaluation.evaluate import Subject, load_subject, start_token

ROUNDING = 1e-4
"""Bits that two sums over float32 logits of other batches may differ by."""
REAL = (
    "Natalia sold clips to 48 of her friends in April.",
    "Return a copy of the string s without blanks.",
    "Zażółć gęślą jaźń, said the hippopotamus.",
)


def covers(subject: Subject, text: bytes) -> Iterator[tuple[int, ...]]:
    """List all sequences of tokens that cover a text, the last one beginning before its end."""
    pieces = [(i, piece) for i, piece in enumerate(subject.view.token_bytes) if piece]
    todo: list[tuple[tuple[int, ...], bytes]] = [((), b"")]
    while todo:
        ids, spelled = todo.pop()
        if len(spelled) >= len(text):
            yield ids
            continue
        rest = text[len(spelled) :]
        todo += [
            ((*ids, i), spelled + piece)
            for i, piece in pieces
            if piece.startswith(rest) or rest.startswith(piece)
        ]


def logprob(subject: Subject, ids: tuple[int, ...]) -> float:
    with torch.inference_mode():
        logits = subject.model(torch.tensor([[start_token(subject.tokenizer), *ids]])).logits[0]
    logprobs = logits[:-1, : subject.view.vocab_size].double().log_softmax(-1)
    return float(logprobs[torch.arange(len(ids)), torch.tensor(ids)].sum())


@pytest.mark.parametrize("text", ["the", " a", "ther"])
def test_equals_brute_force(subject: Subject, text: str) -> None:
    found = text_likelihood(subject, text, floor=0)
    every = [logprob(subject, ids) for ids in covers(subject, text.encode())]
    assert len(every) > 5
    assert -found.bits * math.log(2) == pytest.approx(np.logaddexp.reduce(every), abs=1e-4)
    assert -found.own_bits * math.log(2) == pytest.approx(
        logprob(subject, tuple(subject.view.encode(text).ids.tolist())), abs=1e-4
    )
    assert found.dropped == 0
    assert found.bytes == len(text.encode())
    assert np.exp(found.distributions.logprobs).sum(1) == pytest.approx(1)


def test_a_floor_leaves_the_own_tokenization(subject: Subject) -> None:
    text = "Ada buys 3 pens."
    found = text_likelihood(subject, text, floor=0.9)
    assert found.bits <= found.own_bits + ROUNDING
    assert found.dropped > 0.5


def test_a_tokenizer_without_a_beginning(subject: Subject) -> None:
    none = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    with pytest.raises(CdmError, match="no token to begin a text"):
        text_likelihood(replace(subject, tokenizer=none), "a")


@pytest.mark.slow
def test_real_text_is_never_less_likely_than_its_own_tokenization() -> None:
    """A name at the very beginning (`N|atal|ia`) is where the other tokenizations count; elsewhere next to nothing."""
    subject = load_subject("smollm2")
    found = [text_likelihood(subject, text) for text in REAL]
    for each in found:
        assert each.bits <= each.own_bits
        assert each.dropped < 0.05
        assert np.exp(each.distributions.logprobs).sum(1) == pytest.approx(1)
    of_name, of_words, _ = ((each.own_bits - each.bits) / each.bytes for each in found)
    assert of_name > 0.1
    assert of_words < 0.05
