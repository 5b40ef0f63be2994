"""The teacher's distribution of the student's next token, as exact as a search over continuations gets.

Given the student's tokens so far, the next one is whatever its tokenizer makes of how the teacher would go on: P(s) is
the probability of all continuations whose encoding goes on with s (Phan et al., arXiv 2410.09303; arXiv 2512.14954).
The likeliest continuations are followed until more text cannot change that token.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64

from cdm_toolkit.kd.batch import AlignedBatch
from cdm_toolkit.kd.byte_lattice import ByteSortedVocab, NextLogprobs
from cdm_toolkit.kd.pair import TokenizerPair

PROBES = ("a", "e", "s", "t", "n", " a", "1", ".", "'s", "\n", " ")
"""Texts that may follow. A token is final if it stays before all of these, and no token of the vocabulary that begins
before its end goes on beyond the known text."""
WINDOW = 48
"""Bytes of the text before a boundary that are encoded with what follows, where these lead to the same tokens."""
WRITTEN_ON = 0.05
"""Share of a text that ends in a letter by which the order of the search counts it: a teacher that goes on with the
same word mostly has one token for all of it. Digits, blanks and signs often come one by one, and count in full."""


@dataclass(frozen=True, slots=True, eq=False)
class NextToken:
    """P(next student token), likeliest first, of the continuations that were looked at."""

    ids: Int64[np.ndarray, " token"]
    logprobs: Float64[np.ndarray, " token"]
    """They sum up to one."""
    unsettled: float
    """Share of it on texts that more text may change yet: counted for the token that they have now."""
    unknown: float
    """Share of all probability on continuations that were not looked at."""


class NextTokenOracle:
    """Searches continuations for one pair."""

    def __init__(
        self,
        pair: TokenizerPair,
        *,
        least: float = 1e-6,
        unsettled: float = 0.01,
        most: int = 96,
        at_once: int = 32,
    ) -> None:
        """Look at continuations with at least the share `least` of the probability that is in reach.

        Those that are likely to change the token are followed until these have the share `unsettled` (`WRITTEN_ON`),
        or the model was asked about `most`, `at_once` at a time.
        """
        self.pair, self.least, self.unsettled, self.most, self.at_once = pair, least, unsettled, most, at_once
        self.teacher = ByteSortedVocab(pair.teacher.view.token_bytes)
        self.student = ByteSortedVocab(pair.student.view.token_bytes)
        exact = pair.exact()
        self.ends = {int(i): int(exact[i]) for i in self.teacher.without_bytes if exact[i] >= 0}
        """Special tokens of the teacher that the student has, too."""

    def __call__(
        self, student_ids: Sequence[int], first: int, position: int, next_logprobs: NextLogprobs
    ) -> NextToken | None:
        """Give the distribution of the student's token `position`, in a group that begins at its token `first`.

        `next_logprobs` is the teacher after the text of `student_ids[:first]`. None where the tokens there are not
        what the tokenizer makes of their own text, where the boundary lies within a character, and where no
        continuation leads to `student_ids[first:position]`.
        """
        encoder = _encoder_at(self, student_ids, first, position)
        return None if encoder is None else _Search(self, encoder, next_logprobs).run()


class OracleQuery(NamedTuple):
    """What an oracle is asked at one label of a batch of one row."""

    student_ids: list[int]
    first: int
    """The student's token that the label's group begins with."""
    position: int
    """The label itself, among the student's tokens."""
    before: int
    """Teacher tokens before the group: what the teacher has read there."""

    @classmethod
    def of(cls, batch: AlignedBatch, label: int, group: int) -> OracleQuery:
        """Lay out the question at a label, which is in a group of the batch's one teacher."""
        (side,) = batch.teachers
        at = batch.label_positions + 1
        return cls(
            batch.student["input_ids"][0].tolist(),
            int(at[side.student_rows[group]]),
            int(at[label]),
            int(side.group_positions[group]) + 1,
        )


@dataclass(order=True, frozen=True, slots=True)
class _Continuation:
    """Teacher tokens that follow the boundary, in the order of the search."""

    negative_risk: float
    """Its probability, or the part of it that more text is thought to change."""
    mass: float = field(compare=False)
    ids: tuple[int, ...] = field(compare=False)
    spelled: bytes = field(compare=False)

    @classmethod
    def of(cls, mass: float, ids: tuple[int, ...], spelled: bytes) -> _Continuation:
        written_on = spelled[-1:].isalpha() or spelled[-1:] >= b"\x80"
        return cls(-mass * (WRITTEN_ON if written_on else 1.0), mass, ids, spelled)


@dataclass(slots=True)
class _Search:
    oracle: NextTokenOracle
    encoder: _Encoder
    next_logprobs: NextLogprobs
    settled: dict[int, float] = field(default_factory=dict)
    unknown: float = 0.0
    waiting: list[_Continuation] = field(default_factory=lambda: [_Continuation.of(1.0, (), b"")])
    """A heap."""

    def run(self) -> NextToken | None:
        asked = 0
        while asked < self.oracle.most:
            size = min(self.oracle.at_once, self.oracle.most - asked)
            open_ones = self._open(size)
            if not open_ones:
                break
            asked += len(open_ones)
            self._follow(open_ones)
        return self._distribution()

    def _open(self, size: int) -> list[_Continuation]:
        """Take the likeliest that are not final, none once the others are few; count those that are on the way.

        They are few beside what is settled or may be: within a group most contradicts the given tokens.
        """
        found: list[_Continuation] = []
        risk = -sum(each.negative_risk for each in self.waiting)
        possible = sum(self.settled.values())
        possible += 0.0 if self.encoder.given else sum(each.mass for each in self.waiting)
        while self.waiting and len(found) < size and risk > self.oracle.unsettled * possible:
            each = heapq.heappop(self.waiting)
            token, final = self.encoder.verdict(each.spelled)
            risk += each.negative_risk
            if not final:
                found.append(each)
            elif token is not None:
                self._count(token, each.mass)
                possible += each.mass if self.encoder.given else 0.0
        return found

    def _count(self, token: int, mass: float) -> None:
        self.settled[token] = self.settled.get(token, 0.0) + mass

    def _follow(self, parents: Sequence[_Continuation]) -> None:
        """Let the likely continuations by one more token wait, and count the others as unknown."""
        every = self.next_logprobs([parent.ids for parent in parents])
        found = [(each, *self._children(each, said)) for each, said in zip(parents, every, strict=True)]
        reach = sum(self.settled.values()) + sum(each.mass for each in self.waiting)
        least = self.oracle.least * (reach + sum(float(masses.sum()) for _, _, masses in found))
        for parent, ids, masses in found:
            self.unknown += float(masses[masses < least].sum())
            for i, mass in zip(ids[masses >= least].tolist(), masses[masses >= least].tolist(), strict=True):
                self._add(parent, i, mass)

    def _children(
        self, parent: _Continuation, logprobs: Float[np.ndarray, " vocab"]
    ) -> tuple[Int64[np.ndarray, " token"], Float64[np.ndarray, " token"]]:
        """Give the tokens along the text that is given, with the probability of each continuation."""
        vocab, rest = self.oracle.teacher, self.encoder.text[len(parent.spelled) :]
        begin, end = vocab.range(rest)
        within = [vocab.branches(rest[:size]).exact for size in range(1, len(rest))]
        ids = np.concatenate((vocab.ids[begin:end], *within))
        if not rest:
            ids = np.concatenate((ids, vocab.without_bytes))
        return ids, parent.mass * np.exp(logprobs[ids].astype(np.float64))

    def _add(self, parent: _Continuation, i: int, mass: float) -> None:
        piece = self.oracle.pair.teacher.view.token_bytes[i]
        if piece:
            heapq.heappush(self.waiting, _Continuation.of(mass, (*parent.ids, i), parent.spelled + piece))
            return
        token = self.encoder.at_end(parent.spelled, self.oracle.ends.get(i))
        if token is None:
            self.unknown += mass
        else:
            self._count(token, mass)

    def _distribution(self) -> NextToken | None:
        unsettled, unknown = 0.0, self.unknown
        for each, token in zip(
            self.waiting, self.encoder.now([each.spelled for each in self.waiting]), strict=True
        ):
            if token is None:
                unknown += each.mass
            else:
                unsettled += each.mass
                self._count(token, each.mass)
        total = sum(self.settled.values())
        if total <= 0:
            return None
        order = sorted(self.settled, key=lambda i: (-self.settled[i], i))
        logprobs = np.log(np.array([self.settled[i] for i in order]) / total)
        return NextToken(np.array(order, np.int64), logprobs, unsettled / total, unknown / (unknown + total))


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Encodes what follows a boundary, together with enough of the text before it."""

    pair: TokenizerPair
    vocab: ByteSortedVocab
    before: str
    prefix: list[int]
    """What `before` is encoded as, where the text goes on as it does."""
    given: list[int]
    """The student's tokens between the boundary and the one that is asked for."""
    text: bytes
    """Their bytes."""

    def is_short(self, spelled: bytes) -> bool:
        """Say whether a text has no whole character after the given tokens, or ends within one."""
        return len(spelled) <= len(self.text) or len(_whole(spelled).encode()) < len(spelled)

    def verdict(self, spelled: bytes) -> tuple[int | None, bool]:
        """Tell which token a text leads to, and whether that is final; None that is final contradicts the given."""
        if self.is_short(spelled):
            return None, False
        (now,) = self.now([spelled])
        if now is not None and self._may_merge(spelled, now):
            return now, False
        text = _whole(spelled)
        return now, set(self._next([text + more for more in PROBES])) == {now}

    def _may_merge(self, spelled: bytes, now: int) -> bool:
        """Whether some token begins within the given tokens, or within this one, and reaches beyond the text."""
        within = len(self.text) + len(self.pair.student.view.token_bytes[now] or b"")
        return any(self.vocab.goes_on(spelled[at:]) for at in range(min(within, len(spelled))))

    def now(self, spelled: Sequence[bytes]) -> list[int | None]:
        """Give the token that each text leads to as it is; None for one that contradicts the given, or is short."""
        return self._next([_whole(each) for each in spelled])

    def at_end(self, spelled: bytes, end: int | None) -> int | None:
        """Give the token where the text ends here; `end` is the student's id for that."""
        (token,) = self._next([_whole(spelled)], end=end)
        return token

    def _next(self, texts: Iterable[str], end: int | None = None) -> list[int | None]:
        """Give the token after the given ones in each text; None where the tokens before it are others."""
        encoded = self.pair.student.view.backend.encode_batch(
            [self.before + text for text in texts], add_special_tokens=False
        )
        wanted = self.prefix + self.given
        found: list[int | None] = []
        for encoding in encoded:
            ids = encoding.ids if end is None else [*encoding.ids, end]
            found.append(
                ids[len(wanted)] if ids[: len(wanted)] == wanted and len(ids) > len(wanted) else None
            )
        return found


def _encoder_at(
    oracle: NextTokenOracle, student_ids: Sequence[int], first: int, position: int
) -> _Encoder | None:
    view, ids = oracle.pair.student.view, [int(i) for i in student_ids]
    begin = max((n + 1 for n, i in enumerate(ids[:first]) if not view.token_bytes[i]), default=0)
    before, given, following = (
        b"".join(view.token_bytes[i] or b"" for i in part)
        for part in (ids[begin:first], ids[first:position], ids[first:])
    )
    for size in (WINDOW, len(before)):
        try:
            window = _from_a_blank(before, size).decode()
        except UnicodeDecodeError:
            return None
        text = _whole(following[: len(given) + WINDOW])
        encoded = view.backend.encode(window + text, add_special_tokens=False).ids
        prefix = _without_last(encoded, len(text.encode()), view.token_bytes)
        if prefix is None or encoded[len(prefix) :][: position - first] != ids[first:position]:
            continue
        if prefix[-1:] == ids[begin:first][-1:]:
            return _Encoder(oracle.pair, oracle.student, window, prefix, ids[first:position], given)
    return None


def _whole(spelled: bytes) -> str:
    """Decode without what is no whole character."""
    return spelled.decode(errors="ignore")


def _without_last(ids: list[int], size: int, token_bytes: Sequence[bytes | None]) -> list[int] | None:
    """Give the tokens before the last `size` bytes; None where no token begins there."""
    at = len(ids)
    while size > 0 and at:
        at -= 1
        size -= len(token_bytes[ids[at]] or b"")
    return ids[:at] if size == 0 else None


def _from_a_blank(text: bytes, size: int) -> bytes:
    """Cut to about the last `size` bytes, from a blank on, so that no word is cut."""
    if len(text) <= size:
        return text
    return text[max(text.rfind(b" ", 0, len(text) - size), 0) :]
