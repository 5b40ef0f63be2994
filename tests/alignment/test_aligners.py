from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cdm_toolkit.alignment.aligners import ALIGNERS, align, align_text
from cdm_toolkit.errors import BadOption, UnknownName

from .invariants import invariant_violations

LINES = Path(__file__).parents[1] / "data" / "multilingual.jsonl"


@pytest.fixture(scope="module")
def lines():
    texts = [json.loads(line)["text"] for line in LINES.read_text(encoding="utf-8").splitlines()]
    return [text for text in texts if len(text) < 2000]


@pytest.mark.parametrize("aligner", ALIGNERS)
def test_each_aligner_covers_a_text(views, aligner):
    result = align_text(views["llama3"], views["mistral"], "wonderfully 한글 12345", aligner=aligner)
    found = result.alignment
    assert found.aligner == aligner
    assert (found.n_t, found.n_s) == (len(result.t), len(result.s))
    assert invariant_violations(found) == []


def test_anchored_is_the_byte_truth_on_every_pair(views, lines):
    """Where both sides spell the text, groups end at the bytes at which a token ends on both sides."""
    encoded = {name: view.encode_batch(lines) for name, view in views.items()}
    checked = 0
    for a, b in product(views, views):
        for t, s in zip(encoded[a], encoded[b], strict=True):
            found = align(t, s)
            assert invariant_violations(found, t, s) == []
            if not (t.exact.all() and s.exact.all()):
                continue
            ends = {int(t.end[g.t1 - 1]) for g in found}
            assert found.exact.all()
            assert ends | {0} == set(t.end.tolist()) & set(s.end.tolist()) | {0}
            assert a != b or found.kind_counts()["1-1"] == len(found) == len(t.ids)
            checked += 1
    assert checked > 25 * len(lines)


def test_special_tokens_that_one_side_adds(views):
    found = align_text(views["mistral"], views["qwen2"], "Hi", add_special_tokens=True).alignment
    assert [g.kind for g in found] == ["1-0", "1-1"]
    both = align_text(views["mistral"], views["llama3"], "Hi", add_special_tokens=True).alignment
    assert [(g.kind, g.exact) for g in both] == [("1-1", True), ("1-1", True)]


def test_an_unknown_aligner_is_named_before_anything_is_encoded(write):
    view = write(b"").spans().view  # has no tokenizer to encode with
    known = r"did you mean anchored\? known: anchored, bytes, entropy-dtw, dtw"
    with pytest.raises(UnknownName, match=f"unknown aligner 'anchor'; {known}"):
        align_text(view, view, "a", aligner="anchor")


def test_entropies_must_be_one_a_token(write):
    t = write(b"ab").token(0, 2).spans()
    with pytest.raises(BadOption, match="the number of entropies is 2; give one for each of the 1 tokens"):
        align(t, t, aligner="entropy-dtw", entropy_t=np.zeros(2))
