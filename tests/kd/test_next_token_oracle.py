"""The teacher's distribution of the student's next token, beside brute force and beside sampling."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cdm_toolkit.alignment.aligners import TextAlignment
from cdm_toolkit.kd import TokenizerPair, next_token_oracle
from cdm_toolkit.kd.continuations import Continuations, ReadText
from cdm_toolkit.kd.next_token_oracle import NextToken, NextTokenOracle

LONG = 11
"""Bytes from which brute force takes a token for final."""


def tokenizer(merges: Sequence[tuple[str, str]], *specials: str) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE that knows these merges, without splitting into words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=specials[0])


TEACHER = tokenizer([("a", "b"), ("b", "a"), ("a", "ab")], "<eos>")
STUDENT = tokenizer([("a", "a"), ("b", "b"), ("aa", "bb"), ("b", "aa")], "</s>")
SAYS = [TEACHER.convert_tokens_to_ids(piece) for piece in ("a", "b", "ab", "ba", "aab", "<eos>")]
EOS = SAYS[-1]
PIECES = dict(zip(SAYS, TEACHER.convert_ids_to_tokens(SAYS), strict=True))


@pytest.fixture(scope="module")
def pair() -> TokenizerPair:
    return TokenizerPair(TEACHER, STUDENT)


@pytest.fixture(autouse=True)
def written_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all that more text may change count in full: these tokenizers have no words."""
    if "real" not in request.node.name:
        monkeypatch.setattr(next_token_oracle, "WRITTEN_ON", 1.0)
        every = tuple("".join(each) for size in range(1, 5) for each in itertools.product("ab", repeat=size))
        monkeypatch.setattr(next_token_oracle, "PROBES", every)


class Model:
    """Says a few of the teacher's tokens, by all the tokens before."""

    def __init__(self, seed: int) -> None:
        self.seed, self.asked = seed, 0
        self.of = functools.cache(self._of)

    def _of(self, ids: tuple[int, ...]) -> np.ndarray:
        logprobs = np.full(len(TEACHER), -np.inf)
        logits = 1.5 * np.random.default_rng([self.seed, *ids]).normal(size=len(SAYS))
        logprobs[SAYS] = logits - np.logaddexp.reduce(logits)
        return logprobs

    def __call__(self, paths: Sequence[tuple[int, ...]]) -> np.ndarray:
        self.asked += len(paths)
        return np.stack([self.of(ids) for ids in paths])


@functools.cache
def texts(seed: int) -> dict[tuple[str, bool], float]:
    """List all texts of LONG bytes, and all that end before, with their probabilities."""
    model, found = Model(seed), collections.Counter[tuple[str, bool]]()
    todo: list[tuple[tuple[int, ...], str, float]] = [((), "", 1.0)]
    while todo:
        ids, text, mass = todo.pop()
        ended = ids[-1:] == (EOS,)
        if ended or len(text) >= LONG:
            found[text, ended] += mass
            continue
        masses = np.exp(model.of(ids))
        todo += [((*ids, i), text + PIECES[i] * (i != EOS), mass * masses[i]) for i in SAYS]
    return found


def brute_force(seed: int, before: str, given: Sequence[int]) -> dict[int, float]:
    """Sum up P(student's token after `given`) over all texts."""
    start = len(STUDENT(before).input_ids)
    masses: dict[int, float] = {}
    for (text, ended), mass in texts(seed).items():
        tokens = [*STUDENT(before + text).input_ids, *([STUDENT.eos_token_id] if ended else [])][start:]
        if tokens[: len(given)] == list(given) and len(tokens) > len(given):
            masses[tokens[len(given)]] = masses.get(tokens[len(given)], 0.0) + mass
    total = sum(masses.values())
    return {i: mass / total for i, mass in masses.items()}


def check(found: NextToken | None, wanted: dict[int, float], slack: float) -> None:
    assert found is not None
    masses = dict(zip(found.ids.tolist(), np.exp(found.logprobs).tolist(), strict=True))
    assert sum(masses.values()) == pytest.approx(1)
    assert found.logprobs.tolist() == sorted(found.logprobs.tolist(), reverse=True)
    off = sum(abs(masses.get(i, 0.0) - wanted.get(i, 0.0)) for i in {*masses, *wanted})
    assert off <= 2 * (found.unknown + found.unsettled) + slack


@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force_at_a_boundary(pair: TokenizerPair, seed: int) -> None:
    before = "b "
    ids = STUDENT(before).input_ids
    oracle = NextTokenOracle(pair, least=1e-6, unsettled=1e-3, most=4000)
    found = oracle(ids, len(ids), len(ids), Model(seed))
    assert found is not None
    assert found.unknown + found.unsettled < 0.01
    check(found, brute_force(seed, before, ()), slack=0.002)


@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force_inside_a_group(pair: TokenizerPair, seed: int) -> None:
    """A student token has been read; what contradicts it no longer counts."""
    before, text = "b ", "aabbab"
    ids = STUDENT(before + text).input_ids
    first = len(STUDENT(before).input_ids)
    oracle = NextTokenOracle(pair, least=1e-6, unsettled=1e-3, most=4000)
    for position in range(first + 1, first + 3):
        found = oracle(ids, first, position, Model(seed))
        check(found, brute_force(seed, before, ids[first:position]), slack=0.002)


def test_a_short_search_says_what_it_does_not_know(pair: TokenizerPair) -> None:
    ids = STUDENT("b ").input_ids
    model = Model(1)
    found = NextTokenOracle(pair, most=3, at_once=3)(ids, len(ids), len(ids), model)
    assert model.asked == 3
    assert found is not None
    assert found.unsettled > 0.1
    check(found, brute_force(1, "b ", ()), slack=0.002)


def test_nothing_is_said_within_a_character_or_after_tokens_of_another_tokenization(
    pair: TokenizerPair,
) -> None:
    half = STUDENT("é").input_ids[:1]
    a = STUDENT("a").input_ids
    oracle = NextTokenOracle(pair)
    assert oracle(half, 1, 1, Model(0)) is None
    assert oracle([*a, *a], 1, 1, Model(0)) is None, "the tokenizer writes `aa` as one token"


TEXT = (
    "Janet's ducks lay 16 eggs per day. She eats 3 for breakfast and bakes muffins with 4. She sells 16 - 3 - 4 = 9 "
    "eggs, and makes 9 * 2 = 18 dollars every day at the farmers' market, where the blackberries are attributed to "
    "her neighbour."
)
SAMPLES = 250


@pytest.fixture(scope="module")
def real() -> tuple[TokenizerPair, TextAlignment, ReadText]:
    """Let SmolLM2 read the text."""
    from cdm_toolkit.hub.cut_vocabulary import load_cut
    from cdm_toolkit.hub.models import load_model
    from cdm_toolkit.hub.tokenizers import load_tokenizer

    pair = TokenizerPair.from_loaded(load_tokenizer("smollm2"), load_cut("gpt2", 6000))
    aligned = pair.align(TEXT)
    return pair, aligned, ReadText(load_model("smollm2"), aligned.t.ids.tolist(), vocab=pair.vocab_t)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["1-1", "1-n", "n-1", "inside"])
def test_agrees_with_samples_of_a_real_teacher(
    kind: str, real: tuple[TokenizerPair, TextAlignment, ReadText]
) -> None:
    """Whole continuations are sampled, and encoded with all of the text before."""
    pair, aligned, read = real
    ids = aligned.s.ids.tolist()
    wanted = "1-n" if kind == "inside" else kind
    group = [each for each in aligned.alignment if each.kind == wanted and each.s0 > 12][1]
    position, after = group.s0 + (kind == "inside"), read.after(group.t0)
    found = NextTokenOracle(pair)(ids, group.s0, position, after)
    assert found is not None
    drawn = samples(pair, after, ids, group.s0, position)
    total = drawn.total()
    assert total > SAMPLES / 4
    for i, p in zip(found.ids.tolist(), np.exp(found.logprobs).tolist(), strict=True):
        if p > 0.02:
            assert drawn[i] / total == pytest.approx(p, abs=0.01 + 4 * (p * (1 - p) / total) ** 0.5)


def samples(
    pair: TokenizerPair, model: Continuations, ids: Sequence[int], first: int, position: int
) -> collections.Counter[int]:
    """Count the student's token `position` in sampled continuations that lead to the tokens before it."""
    rng, teacher, student = np.random.default_rng(0), pair.teacher.view, pair.student.view
    before = b"".join(student.token_bytes[i] or b"" for i in ids[:first])
    given = b"".join(student.token_bytes[i] or b"" for i in ids[first:position])
    possible = [
        piece is not None and (piece.startswith(given) or given.startswith(piece))
        for piece in teacher.token_bytes
    ]
    paths: list[tuple[int, ...]] = [()] * SAMPLES
    for step in range(4):
        distinct = sorted({path for path in paths if path[-1:] == () or teacher.token_bytes[path[-1]]})
        masses = dict(zip(distinct, np.exp(model(distinct).astype(np.float64)), strict=True))
        for nth, path in enumerate(paths):
            if path in masses:
                p = masses[path] * possible if step == 0 and given else masses[path]
                paths[nth] = (*path, int(rng.choice(len(p), p=p / p.sum())))
    found = collections.Counter[int]()
    for path in paths:
        spelled = b"".join(teacher.token_bytes[i] or b"" for i in path)
        tokens = student.encode((before + spelled).decode(errors="ignore")).ids.tolist()
        if tokens[:position] == list(ids[:position]) and len(tokens) > position:
            found[tokens[position]] += 1
    return found
