"""Likelihood scoring against its authors' code, and against the exact distribution of bytes.

The golden file has what github.com/truongbuu/cross-tokenizer-scoring makes at commit 850d6619: `prob_next_subtoken`
for a BPE of 12 merges, a student with the first two of them, and a random teacher that gives next to nothing to what
BPE does not make and to tokens that end inside the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.kd import Likelihood, TokenizerPair
from cdm_toolkit.kd.byte_lattice import ByteSortedVocab, byte_distributions
from cdm_toolkit.kd.loss_sums import LossInputs, compare, following_groups
from cdm_toolkit.kd.sparse_logprobs import top_k
from cdm_toolkit.kd.types import Comparison, TeacherSignal
from cdm_toolkit.vocab_map.spelling import Spellings

from .cases import WorldPair, draw

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "likelihood_golden.npz")


class SpelledPair(WorldPair):
    """A pair of which nothing but the spellings is known."""

    def __init__(self, of_t: np.ndarray, vocab_s: int) -> None:
        self.of_t = of_t
        self.world = replace(draw("exact", 0).world, vocab_t=len(of_t), vocab_s=vocab_s)

    def __new__(cls, of_t: np.ndarray, vocab_s: int) -> SpelledPair:
        return TokenizerPair.__new__(cls)

    def spellings(self) -> Spellings:
        nothing = np.full((len(self.of_t), 1), -1)  # the table is wider than any spelling
        return Spellings(
            np.hstack((self.of_t, nothing)).astype(np.int32), np.zeros((self.vocab_s, 1), np.int32)
        )


def taught(pair: SpelledPair, teacher: torch.Tensor, ids: Sequence[int]) -> Comparison:
    """Give what is compared along a text of teacher tokens; `teacher` are the log-probabilities of each."""
    method = Likelihood(pair, top_k=min(pair.vocab_t, pair.vocab_s))
    spelled = [[s for s in pair.of_t[i].tolist() if s >= 0] for i in ids]
    groups, student = torch.arange(len(ids)), torch.tensor([s for way in spelled for s in way])
    tokens = groups.repeat_interleave(torch.tensor([len(way) for way in spelled]))
    rows = torch.arange(len(student))
    signal = TeacherSignal(
        top_k(teacher, pair.vocab_t, real=pair.vocab_t),
        teacher.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1),
        groups,
        torch.tensor(ids),
    )
    inputs = LossInputs(
        method=method,
        signal=signal,
        vocab_s=pair.vocab_s,
        student_rows=torch.searchsorted(tokens, groups),
        token_rows=rows,
        token_ids=student,
        token_group=tokens,
        follows=groups > 0,
    )
    return compare(torch.zeros(len(student), pair.vocab_s, dtype=teacher.dtype), inputs)


def dense(found: Comparison, vocab: int) -> np.ndarray:
    """Lay the teacher's probabilities out over all student ids."""
    masses = torch.zeros(len(found.ids), vocab + 1, dtype=found.teacher.dtype)
    return masses.scatter_add(1, found.ids % (vocab + 1), found.teacher.exp())[:, :vocab].numpy()


def test_probabilities_are_the_authors() -> None:
    vocab_s = len(GOLDEN["student_vocab"])
    pair = SpelledPair(GOLDEN["spellings"], vocab_s)
    found = taught(pair, torch.from_numpy(GOLDEN["teacher"]), GOLDEN["teacher_ids"].tolist())
    probabilities = dense(found, vocab_s)[GOLDEN["positions"].astype(int)]
    assert probabilities == pytest.approx(GOLDEN["probabilities"], abs=1e-5)


PIECES = (b"a", b"b", b"ab", b"ba", b"bb", b"aba", b"abba", None)
VOCAB = ByteSortedVocab(PIECES)


def next_logprobs(seed: int, ids: Sequence[int], own: Sequence[int], *, inside: float) -> np.ndarray:
    """Give a random distribution; tokens that end inside the text, but for its own, lose `inside` nats."""
    logits = np.random.default_rng([seed, *(i + 1 for i in ids)]).normal(size=len(PIECES))
    if list(ids) == list(own[: len(ids)]) and len(ids) < len(own):
        left = b"".join(PIECES[i] or b"" for i in own[len(ids) :])
        for i, piece in enumerate(PIECES):
            if piece and left.startswith(piece) and i != own[len(ids)]:
                logits[i] -= inside
    return logits - np.logaddexp.reduce(logits)


def of_bytes(seed: int, own: Sequence[int], inside: float) -> tuple[np.ndarray, np.ndarray]:
    """Give the probabilities of a and b as a student of single bytes is taught them, and the exact ones."""
    of_t = np.array(
        [[*((piece or b"").replace(b"a", b"\0").replace(b"b", b"\1")), *[-1] * 4][:4] for piece in PIECES]
    )
    teacher = np.stack([next_logprobs(seed, own[:n], own, inside=inside) for n in range(len(own))])
    found = taught(SpelledPair(of_t, 2), torch.from_numpy(teacher), own)
    text = b"".join(PIECES[i] or b"" for i in own)
    exact = byte_distributions(
        text, VOCAB, lambda paths: np.stack([next_logprobs(seed, path, own, inside=inside) for path in paths])
    )
    return dense(found, 2), np.exp(exact.logprobs[:-1, [97, 98]])


tokens = st.lists(st.integers(0, len(PIECES) - 2), min_size=1, max_size=5)


@given(seed=st.integers(0, 1000), own=tokens)
def test_is_exact_where_no_other_token_ends_inside_the_text(seed: int, own: list[int]) -> None:
    taught_, exact = of_bytes(seed, own, inside=60.0)
    assert taught_ == pytest.approx(exact, abs=1e-9)


def test_what_other_tokens_inside_the_text_cost() -> None:
    """The more probability they have, the further it is from the exact one; a flat teacher is the worst."""
    distances = []
    for inside in (0.0, 3.0, 6.0):
        pairs = [of_bytes(seed, [4, 3, 6, 0, 2], inside) for seed in range(20)]
        distances.append(np.mean([np.abs(found - exact).sum(1).mean() for found, exact in pairs]))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1
    assert distances[-1] < 0.02


def test_a_candidate_covers_later_groups() -> None:
    """Of the random cases of the twins, some look into the groups before."""
    alone = 0
    for seed in range(40):
        case = draw("likelihood", seed, k=9)
        cut = replace(case, begins=tuple(range(case.groups)))
        alone += case.twin("likelihood") != pytest.approx(cut.twin("likelihood"))
    assert alone > 5


def test_groups_follow_in_one_text(nested: TokenizerPair) -> None:
    rows = [{"prompt": "How many?", "completion": "There are 12 apples."}, {"text": "Two naïve cats sat."}]
    batch = nested.collate(rows)
    (side,) = batch.teachers
    begins = [0, side.groups_per_row[0]]
    found = torch.nonzero(~following_groups(batch, side)).flatten().tolist()
    assert found == begins
    dropped = batch.teachers[0]
    gap = replace(dropped, student_rows=dropped.student_rows + (torch.arange(dropped.groups) == 2))
    assert torch.nonzero(~following_groups(batch, gap)).flatten().tolist() == [0, 2, begins[1]]
