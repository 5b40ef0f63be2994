"""Tiny pairs: two kinds of tokenizers, and the same pair for the same texts."""

from __future__ import annotations

from pathlib import Path

from cdm_toolkit.hub.models import model_fingerprint
from cdm_toolkit.hub.tiny_models import VOCABULARY, new_tiny_pair
from cdm_toolkit.hub.tokenizers import load_view

TEXTS = ["the cat sat on the mat", "the hat sat on the cat", "what the cat said: 한국어"]


def test_the_tokenizers_differ_and_spell_the_text(tmp_path: Path) -> None:
    pair = new_tiny_pair(TEXTS, tmp_path)
    views = [load_view(pair.teacher), load_view(pair.student)]
    assert views[0].fingerprint != views[1].fingerprint
    for view in views:
        assert view.vocab_size <= VOCABULARY
        spans = view.encode("that cat, é", add_special_tokens=False)
        assert spans.text_bytes == "that cat, é".encode()
        assert spans.exact.all()


def test_the_same_texts_give_the_same_pair(tmp_path: Path) -> None:
    one, two = (new_tiny_pair(TEXTS, tmp_path / name) for name in "ab")
    assert load_view(one.student).fingerprint == load_view(two.student).fingerprint
    assert model_fingerprint(one.teacher) == model_fingerprint(two.teacher)
    assert model_fingerprint(one.teacher) != model_fingerprint(one.student)
