"""Exact byte distributions of a token model: what comes next in bytes, summed over all tokenizations.

A token model is also a byte model: the probability that a text begins with given bytes is the sum over all token
sequences that cover these bytes and whose last token begins before their end (Vieira et al., arXiv 2412.03719,
section 3; Hayase et al., arXiv 2506.14123, section 3). All sequences are summed, not only the one that the tokenizer
makes. Their number grows exponentially with the text; a `floor` drops the unlikely ones, and the dropped
probability is reported.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float64, Int64

END = 256
"""The outcome after the 256 bytes: the text ends, or a special token follows."""
OUTCOMES = 257

NextLogprobs = Callable[[Sequence[tuple[int, ...]]], Float[np.ndarray, "path vocab"]]
"""Gives the log-probabilities of the next token after each of several sequences of ids."""


class ByteSortedVocab:
    """Token ids in the order of their bytes, so that all that begin with some bytes are one range.

    >>> vocab = ByteSortedVocab([b"a", b"ab", b"b", None])
    >>> vocab.range(b"a"), vocab.ids[:2].tolist(), vocab.without_bytes.tolist()
    ((0, 2), [0, 1], [3])
    """

    def __init__(self, token_bytes: Sequence[bytes | None]) -> None:
        """Take the bytes of each id; None, or no bytes at all, for a special token."""
        spelled = sorted((piece, i) for i, piece in enumerate(token_bytes) if piece)
        self.bytes = [piece for piece, _ in spelled]
        self.ids: Int64[np.ndarray, " token"] = np.array([i for _, i in spelled], np.int64)
        self.without_bytes = np.array([i for i, piece in enumerate(token_bytes) if not piece], np.int64)
        self.size = len(token_bytes)
        self._branches: dict[bytes, Branches] = {}

    def range(self, prefix: bytes) -> tuple[int, int]:
        """Give the half-open range, in byte order, of the tokens that begin with these bytes."""
        return bisect_left(self.bytes, prefix), bisect_left(self.bytes, _after(prefix) or _BEHIND_ALL)

    def goes_on(self, prefix: bytes) -> bool:
        """Say whether some token begins with these bytes and is longer."""
        begin, end = self.range(prefix)
        return begin < end and len(self.bytes[end - 1]) > len(prefix)

    def branches(self, prefix: bytes) -> Branches:
        """Split the tokens with this prefix: those equal to it, and the longer ones by their next byte."""
        if prefix not in self._branches:
            self._branches[prefix] = self._find_branches(prefix)
        return self._branches[prefix]

    def _find_branches(self, prefix: bytes) -> Branches:
        low, high = self.range(prefix)
        begin = low
        while begin < high and len(self.bytes[begin]) == len(prefix):
            begin += 1
        firsts, following, at = [], [], begin
        while at < high:
            byte = self.bytes[at][len(prefix)]
            firsts.append(at)
            following.append(byte)
            at = bisect_left(self.bytes, _after(prefix + bytes([byte])) or _BEHIND_ALL, at, high)
        return Branches(
            self.ids[low:begin], begin, high, np.array(firsts, np.int64), np.array(following, np.int64)
        )


_BEHIND_ALL = b"\xff" * 4096


def _after(prefix: bytes) -> bytes:
    """Give the smallest bytes that sort after all that begin with `prefix`; empty where there are none."""
    shorter = prefix.rstrip(b"\xff")
    return shorter[:-1] + bytes([shorter[-1] + 1]) if shorter else b""


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """Tokens with one prefix: `exact` are equal to it, those in [begin, end) are longer.

    The tokens from `firsts[i]` on, in byte order, continue with the byte `following[i]`.
    """

    exact: Int64[np.ndarray, " token"]
    begin: int
    end: int
    firsts: Int64[np.ndarray, " branch"]
    following: Int64[np.ndarray, " branch"]


@dataclass(frozen=True, slots=True, eq=False)
class ByteDistributions:
    """Next-byte distributions after each prefix of a text: entry n is for its first n bytes, from 0 to all of them."""

    text: bytes
    log_joint: Float64[np.ndarray, "prefix outcome"]
    """log P(the first n bytes, then this byte or END), in nats."""
    log_dropped: Float64[np.ndarray, " prefix"]
    """log of the probability of the dropped paths that end here, −inf without any."""
    paths: int
    """Token sequences after which the model was evaluated."""

    @property
    def log_prefix(self) -> Float64[np.ndarray, " prefix"]:
        """log P(the text begins with the first n bytes), without what was dropped."""
        log_prefix: np.ndarray = np.logaddexp.reduce(self.log_joint, axis=1)
        return log_prefix

    @property
    def logprobs(self) -> Float64[np.ndarray, "prefix outcome"]:
        """log P(next byte | the first n bytes). Each row sums to one."""
        logprobs: np.ndarray = self.log_joint - self.log_prefix[:, None]
        return logprobs

    @property
    def dropped(self) -> float:
        """The largest share of a prefix's probability that was dropped at it."""
        return float(np.exp(self.log_dropped - np.logaddexp(self.log_prefix, self.log_dropped)).max())


@dataclass(frozen=True, slots=True)
class _Path:
    ids: tuple[int, ...]
    logprob: float


@dataclass(slots=True)
class _Lattice:
    """Token sequences (paths), by the byte at which they end, that the model has not been evaluated after."""

    text: bytes
    vocab: ByteSortedVocab
    floor: float
    kept: frozenset[tuple[int, ...]]
    waiting: dict[int, list[_Path]] = field(default_factory=dict)

    def alive(self, end: int, log_covered: float) -> tuple[list[_Path], float]:
        """Remove the paths that end here; give those to keep, and the log-probability of those that are dropped.

        `log_covered` is the log-probability of the paths that end beyond this byte.
        """
        paths = self.waiting.pop(end, [])
        here = np.logaddexp.reduce([log_covered, *(path.logprob for path in paths)])
        least = here + (np.log(self.floor) if self.floor else -np.inf)
        alive = [path for path in paths if path.logprob >= least or path.ids in self.kept]
        dropped = [path.logprob for path in paths if path.logprob < least and path.ids not in self.kept]
        return alive, float(np.logaddexp.reduce(dropped)) if dropped else -np.inf

    def extend(
        self, path: _Path, begin: int, logprobs: Float[np.ndarray, " vocab"], joint: np.ndarray
    ) -> None:
        """Add a path's next-byte probabilities to `joint`, and queue its continuations along the text."""
        in_order = np.exp(logprobs[self.vocab.ids].astype(np.float64))
        if len(self.vocab.without_bytes):
            ends = np.logaddexp.reduce(logprobs[self.vocab.without_bytes].astype(np.float64))
            joint[begin, END] = np.logaddexp(joint[begin, END], path.logprob + ends)
        for end in range(begin, len(self.text) + 1):
            branches = self.vocab.branches(self.text[begin:end])
            for i in branches.exact:
                step = _Path((*path.ids, int(i)), path.logprob + float(logprobs[i]))
                self.waiting.setdefault(end, []).append(step)
            if branches.begin == branches.end:
                break
            masses = np.add.reduceat(in_order[: branches.end], branches.firsts)
            with np.errstate(divide="ignore"):
                added = path.logprob + np.log(masses)
            joint[end, branches.following] = np.logaddexp(joint[end, branches.following], added)


def byte_distributions(
    text: bytes,
    vocab: ByteSortedVocab,
    next_logprobs: NextLogprobs,
    *,
    floor: float = 0.0,
    own: Sequence[int] = (),
) -> ByteDistributions:
    """Give the distribution of the byte that follows each prefix of a text, over all tokenizations of the prefix.

    `next_logprobs` is the model, given what stands before the text. With `floor` 0 the result is exact, at a cost
    that doubles with every few bytes. Above 0 a path with less than that share of the probability of the prefix
    that it spells is dropped; the tokenization `own` never is, so that the text is at least as likely as it alone.
    """
    kept = frozenset(tuple(own[:n]) for n in range(len(own) + 1))
    lattice = _Lattice(text, vocab, floor, kept, {0: [_Path((), 0.0)]})
    joint = np.full((len(text) + 1, OUTCOMES), -np.inf)
    dropped = np.full(len(text) + 1, -np.inf)
    asked = 0
    for begin in range(len(text) + 1):
        alive, dropped[begin] = lattice.alive(begin, float(np.logaddexp.reduce(joint[begin])))
        if not alive:
            continue
        asked += len(alive)
        for path, logprobs in zip(alive, next_logprobs([path.ids for path in alive]), strict=True):
            lattice.extend(path, begin, logprobs, joint)
    return ByteDistributions(text, joint, dropped, asked)
