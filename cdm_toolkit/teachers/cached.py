"""Teacher backed by a cache of log-probabilities: no model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cdm_toolkit.artifacts.teacher_cache import CachedRow, TeacherCache, read_header
from cdm_toolkit.errors import BadArtifact, BadOption
from cdm_toolkit.kd.aligned_rows import AlignedRow
from cdm_toolkit.kd.batch import AlignedBatch
from cdm_toolkit.kd.rows import Row, rows_fingerprint
from cdm_toolkit.kd.tokenized_rows import TemplateName, TokenizerSide, template_fingerprint
from cdm_toolkit.kd.types import SignalRequest, TeacherSignal, TopK


def open_cache(
    folder: str | Path, side: TokenizerSide, rows: Iterable[Row], template: TemplateName
) -> TeacherCache:
    """Open a cache for a run that reads `rows` with the teacher's `side`; the cache may stop short of the last row.

    Raises as `TeacherCache.open`.
    """
    count = read_header(Path(folder)).rows
    return TeacherCache.open(
        folder,
        side.view,
        data_fingerprint=rows_fingerprint(islice(rows, count)),
        template_fingerprint=template_fingerprint(side, template),
    )


def check_rows(cache: TeacherCache, rows: Sequence[AlignedRow], nth: int) -> None:
    """See that what the run's `nth` teacher reads of each row begins what the cache has of it.

    BadArtifact for the first row that does not, or is not there.
    """
    for row in rows:
        if not len(row.teachers[nth].groups):
            continue
        ids, there = row.teachers[nth].ids, cache.token_ids(row.row)
        if len(ids) > len(there):
            problem = f"row {row.row} has {len(there)} tokens there, and the run reads {len(ids)}"
            fix = f"lower `max_length` to {cache.header.max_length}, or make another cache with a longer one"
            raise BadArtifact(cache.folder, problem, fix)
        differs = np.flatnonzero(there[: len(ids)] != ids)
        if len(differs):
            at = int(differs[0])
            problem = (
                f"row {row.row} reads otherwise: its token {at + 1} is {there[at]} there and {ids[at]} now"
            )
            raise BadArtifact(cache.folder, problem, "make another cache of this data with `write_cache`")


@runtime_checkable
class CachedRows(Protocol):
    """Rows that a teacher has scored: a cache, or answers of a server."""

    @property
    def folder(self) -> Path:
        """Where they are, for messages."""

    @property
    def k(self) -> int:
        """Candidates at a position."""

    @property
    def is_whole(self) -> bool:
        """Whether these are all ids, in their own order."""

    def row(self, number: int) -> CachedRow:
        """Give a row by its number in the data. BadArtifact where it is not there."""


class Cached:
    """Log-probabilities that `write_cache` has stored, in place of a model."""

    def __init__(self, cache: CachedRows) -> None:
        self.cache = cache

    def signal(self, batch: AlignedBatch, request: SignalRequest) -> TeacherSignal:
        """Look up the positions of a batch, by the numbers of its rows.

        BadOption for a `top_k` larger than the cache has, and for mean logits, which no cache holds; BadArtifact
        where the cache has other tokens at a row's positions than the batch.
        """
        self.check(request)
        (side,) = batch.teachers
        device = side.next_ids.device
        positions, group = side.row_positions.cpu().numpy(), side.token_group.cpu().numpy()
        first, next_ids = side.group_first.cpu().numpy(), side.next_ids.cpu().numpy()
        tops: list[tuple[Tensor, Tensor]] = []
        tokens: list[np.ndarray] = []
        end = 0
        for number, count in zip(batch.rows, side.tokens_per_row, strict=True):
            begin, end = end, end + count
            if not count:
                continue
            row = self.cache.row(number)
            at = self._offsets(row, positions[begin:end])
            self._check_tokens(row, positions[begin:end], next_ids[begin:end])
            wanted = at if request.token_top else at[first[(first >= begin) & (first < end)] - begin]
            tops.append(self._top(row, wanted, request.top_k))
            tokens.append(row.token_logprobs[at])
        ids, logprobs = (torch.cat(each).to(device) for each in zip(*tops, strict=True))
        top, token_top = TopK(ids, logprobs), None
        if not request.token_logprobs:
            return TeacherSignal(top)
        if request.token_top:
            top, token_top = top.at(side.group_first), top
        token_logprobs = torch.from_numpy(np.concatenate(tokens)).to(device)
        return TeacherSignal(
            top, token_logprobs, torch.from_numpy(group).to(device), side.next_ids, token_top
        )

    def check(self, request: SignalRequest) -> None:
        """Refuse a request that the cache cannot answer. BadOption."""
        if request.mean_logits:
            raise BadOption("positions", "mean", "boundary: a cache has no whole logits to average")
        if request.top_k > self.cache.k:
            allowed = f"at most {self.cache.k}: {self.cache.folder} has no more"
            if isinstance(self.cache, TeacherCache):
                allowed += f"; or make another cache with k {request.top_k}"
            raise BadOption("top_k", request.top_k, allowed)

    def _offsets(self, row: CachedRow, positions: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
        """Turn positions in the row's tokens into offsets in the cache."""
        at = positions - row.first
        if at.min() < 0 or at.max() >= len(row.token_logprobs):
            problem = f"row {row.number} has positions {row.first} to {len(row.token_ids) - 2} there"
            fix = "make another cache of this data with `write_cache`"
            raise BadArtifact(
                self.cache.folder,
                f"{problem}, the run asks for {positions.min()} to {positions.max()}",
                fix,
            )
        return at

    def _check_tokens(
        self, row: CachedRow, positions: Int[np.ndarray, " token"], next_ids: Int[np.ndarray, " token"]
    ) -> None:
        """See that the row of this number is the one that was cached."""
        differs = np.flatnonzero(row.token_ids[positions + 1] != next_ids)
        if len(differs):
            at = positions[differs[0]] + 1
            problem = f"row {row.number} has the token {row.token_ids[at]} at position {at} there"
            fix = "number the rows as the data of the cache does, or make another cache with `write_cache`"
            raise BadArtifact(self.cache.folder, f"{problem}, and {next_ids[differs[0]]} in the batch", fix)

    def _top(self, row: CachedRow, at: Int[np.ndarray, " group"], k: int) -> tuple[Tensor, Tensor]:
        if self.cache.is_whole:
            best = torch.from_numpy(row.logprobs[at]).topk(k, dim=-1)
            return best.indices, best.values
        ids, logprobs = row.ids[at, :k], row.logprobs[at, :k]
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(np.ascontiguousarray(logprobs))
