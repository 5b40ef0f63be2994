"""Records of vocabulary mapping: the static map, and the neighbour table of both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from cdm_toolkit.errors import TokenizerMismatch, UnknownTokenId
from cdm_toolkit.tokdiff.view import TokenizerView

NO_MATCH = -1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenizerPairInfo:
    """Names, fingerprints and vocabulary sizes of the two tokenizers that a mapping was built for."""

    name_t: str
    name_s: str
    fingerprint_t: str
    fingerprint_s: str
    size_t: int
    size_s: int


def pair_info(view_t: TokenizerView, view_s: TokenizerView) -> dict[str, Any]:
    """Give the fields of `TokenizerPairInfo` for two tokenizers."""
    return {
        "name_t": view_t.name,
        "name_s": view_s.name,
        "fingerprint_t": view_t.fingerprint,
        "fingerprint_s": view_s.fingerprint,
        "size_t": view_t.vocab_size,
        "size_s": view_s.vocab_size,
    }


def pair_info_of(built: TokenizerPairInfo) -> dict[str, Any]:
    """Give these fields of a map or table."""
    return {field.name: getattr(built, field.name) for field in fields(TokenizerPairInfo)}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class VocabMap(TokenizerPairInfo):
    """Map from each teacher id to student ids with weights that sum to 1, as CSR rows, the best match first.

    An empty row is an id without a match. `max_edit_distance` and `match_digits` are None for strategies that do
    not use them.
    """

    strategy: str
    indptr: Int64[np.ndarray, " bound"]
    ids: Int32[np.ndarray, " entries"]
    weights: Float32[np.ndarray, " entries"]
    max_edit_distance: float | None = None
    match_digits: bool | None = None

    @property
    def matched(self) -> Bool[np.ndarray, " vocab_t"]:
        """Mark the teacher ids that have a match."""
        return np.diff(self.indptr) > 0

    @property
    def coverage(self) -> float:
        """Share of teacher ids that have a match."""
        return float(self.matched.mean()) if self.size_t else 0.0

    def row(self, teacher_id: int) -> list[tuple[int, float]]:
        """Return a teacher id's student ids and weights; UnknownTokenId outside the vocabulary."""
        if not 0 <= teacher_id < self.size_t:
            raise UnknownTokenId(self.name_t, teacher_id, self.size_t)
        lo, hi = self.indptr[teacher_id], self.indptr[teacher_id + 1]
        return list(zip(self.ids[lo:hi].tolist(), self.weights[lo:hi].tolist(), strict=True))

    def dense(self) -> Int64[np.ndarray, " vocab_t"]:
        """Return the best student id of each teacher id, −1 where there is none."""
        best = np.full(self.size_t, NO_MATCH, np.int64)
        best[self.matched] = self.ids[self.indptr[:-1][self.matched]]
        return best


def single_match_map(
    strategy: str,
    of: Mapping[str, Any],
    best: Int64[np.ndarray, " vocab_t"],
    *,
    match_digits: bool | None = None,
) -> VocabMap:
    """Build a map with at most one student id per teacher id; `best` is −1 where there is none."""
    matched = best >= 0
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(matched, dtype=np.int64)])
    ids = best[matched].astype(np.int32)
    weights = np.ones(len(ids), np.float32)
    return VocabMap(
        strategy=strategy, **of, indptr=indptr, ids=ids, weights=weights, match_digits=match_digits
    )


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The near ids of each id of one side, as CSR rows, nearest first.

    `distance` is edits / (sum of lengths). `rank` orders entries across rows and directions by (distance, whether
    the stripped whitespace differs, whether neither token is a prefix of the other): rank // 4, rank // 2 % 2 and
    rank % 2. Ranks are integers, so comparing them does not depend on rounding. In a row, equal ranks are ordered
    by id.
    """

    indptr: Int64[np.ndarray, " bound"]
    ids: Int32[np.ndarray, " entries"]
    distance: Float32[np.ndarray, " entries"]
    rank: Int32[np.ndarray, " entries"]

    def row(self, token_id: int) -> list[tuple[int, float]]:
        """Return an id's near ids and their distances, nearest first."""
        lo, hi = self.indptr[token_id], self.indptr[token_id + 1]
        return list(zip(self.ids[lo:hi].tolist(), self.distance[lo:hi].tolist(), strict=True))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NeighbourTable(TokenizerPairInfo):
    """The neighbours of all ids without an exact partner, in both directions."""

    max_edit_distance: float
    match_digits: bool
    t_to_s: Neighbours
    s_to_t: Neighbours


def check_tokenizers(what: str, built: TokenizerPairInfo, wanted: Mapping[str, Any]) -> None:
    """Refuse what was built for other tokenizers than the wanted ones: TokenizerMismatch."""
    views = ", ".join(f"load_view({name!r})" for name in (wanted["name_t"], wanted["name_s"]))
    fix = f"build it again with `build_neighbours({views})`"
    for side, built_for, given in (
        ("teacher", (built.name_t, built.fingerprint_t), (wanted["name_t"], wanted["fingerprint_t"])),
        ("student", (built.name_s, built.fingerprint_s), (wanted["name_s"], wanted["fingerprint_s"])),
    ):
        if built_for[1] != given[1]:
            raise TokenizerMismatch(what, side, built_for, given, fix)
