"""Bytes of a token model over all tokenizations, beside brute force on small vocabularies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_toolkit.kd.byte_lattice import END, ByteSortedVocab, byte_distributions

PIECES: tuple[bytes | None, ...] = (b"a", b"b", b"ab", b"ba", b"aba", b"a", b"\xff", b"\xff\xff", None, b"")
"""Two ids with the same bytes, bytes with no successor, two ids without any."""
VOCAB = ByteSortedVocab(PIECES)


class Model:
    """A model whose next token depends on all tokens before it."""

    def __init__(self, seed: int, sharp: float = 1.0) -> None:
        self.seed, self.sharp = seed, sharp

    def of(self, ids: tuple[int, ...]) -> np.ndarray:
        logits = self.sharp * np.random.default_rng([self.seed, *(i + 1 for i in ids)]).normal(
            size=len(PIECES)
        )
        return logits - np.logaddexp.reduce(logits)

    def __call__(self, paths: Sequence[tuple[int, ...]]) -> np.ndarray:
        return np.stack([self.of(ids) for ids in paths])


def covers(model: Model, prefix: bytes) -> Iterator[tuple[tuple[int, ...], float]]:
    """List all sequences of tokens that cover a prefix, the last one beginning before its end."""
    todo: list[tuple[tuple[int, ...], bytes, float]] = [((), b"", 0.0)]
    while todo:
        ids, spelled, logprob = todo.pop()
        if len(spelled) >= len(prefix):
            yield ids, logprob
            continue
        for i, piece in enumerate(PIECES):
            longer = spelled + (piece or b"")
            if piece and (longer.startswith(prefix) or prefix.startswith(longer)):
                todo.append(((*ids, i), longer, logprob + model.of(ids)[i]))


def brute_force(model: Model, prefix: bytes) -> float:
    return sum(np.exp(logprob) for _, logprob in covers(model, prefix))


def tokenizations(text: bytes) -> Iterator[tuple[int, ...]]:
    if not text:
        yield ()
    for i, piece in enumerate(PIECES):
        if piece and text.startswith(piece):
            yield from ((i, *rest) for rest in tokenizations(text[len(piece) :]))


@given(seed=st.integers(0, 1000), text=st.lists(st.sampled_from([b"a", b"b", b"\xff"]), max_size=6))
@settings(max_examples=40, deadline=None)
def test_equals_brute_force_over_all_tokenizations(seed: int, text: list[bytes]) -> None:
    model, joined = Model(seed), b"".join(text)
    found = byte_distributions(joined, VOCAB, model)
    for end in range(len(joined) + 1):
        for byte in b"ab\xff":
            wanted = brute_force(model, joined[:end] + bytes([byte]))
            assert np.exp(found.log_joint[end, byte]) == pytest.approx(wanted, rel=1e-9, abs=1e-300)
        ends = sum(
            np.exp(sum(model.of(ids[:n])[i] for n, i in enumerate(ids))) * np.exp(model.of(ids)[[8, 9]]).sum()
            for ids in tokenizations(joined[:end])
        )
        assert np.exp(found.log_joint[end, END]) == pytest.approx(ends, rel=1e-9)


@given(seed=st.integers(0, 1000), text=st.text("ab", min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_is_one_distribution_of_texts(seed: int, text: str) -> None:
    """What follows a prefix sums to the prefix: nothing is lost and nothing counted twice."""
    found = byte_distributions(text.encode(), VOCAB, Model(seed))
    assert found.dropped == 0
    assert np.exp(found.logprobs).sum(1) == pytest.approx(1)
    assert found.log_prefix[0] == pytest.approx(0)
    along = found.log_joint[np.arange(len(text)), list(text.encode())]
    assert found.log_prefix[1:] == pytest.approx(along)


def test_a_floor_drops_what_is_unlikely_and_says_how_much() -> None:
    model, text = Model(3, sharp=3.0), b"abaabbabaabab"
    exact = byte_distributions(text, VOCAB, model)
    own = min(itertools.islice(tokenizations(text), 200), key=len)
    pruned = byte_distributions(text, VOCAB, model, floor=1e-3, own=own)
    assert 0 < pruned.dropped < 0.1
    assert pruned.paths < exact.paths / 2
    assert (pruned.log_prefix <= exact.log_prefix + 1e-9).all()
    assert exact.log_prefix[-1] - pruned.log_prefix[-1] < 0.1


def test_the_own_tokenization_is_never_dropped() -> None:
    model, text = Model(5, sharp=8.0), b"abaabbab"
    for own in itertools.islice(tokenizations(text), 0, 60, 7):
        of_own = sum(model.of(own[:n])[i] for n, i in enumerate(own))
        pruned = byte_distributions(text, VOCAB, model, floor=0.9, own=own)
        assert pruned.log_prefix[-1] >= of_own - 1e-9
