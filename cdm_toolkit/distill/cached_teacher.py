"""A teacher that has spoken once: what its cache says is what it says in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cdm_toolkit.artifacts.teacher_cache import CachedRow, TeacherCache, read_header
from cdm_toolkit.distill.config import TemplateName
from cdm_toolkit.distill.losses.record import TeacherSays, TopK
from cdm_toolkit.distill.reading import Side, template_fingerprint
from cdm_toolkit.distill.rows import Row, rows_fingerprint
from cdm_toolkit.errors import BadArtifact, BadOption

if TYPE_CHECKING:
    from torch import Tensor

    from cdm_toolkit.distill.collate import TeacherBatch
    from cdm_toolkit.distill.fit import Features


def open_cache(folder: str | Path, side: Side, rows: Sequence[Row], template: TemplateName) -> TeacherCache:
    """Open a cache for a run that reads `rows` on the teacher's `side`; the cache may stop short of the last row.

    Raises as `TeacherCache.open`.
    """
    count = read_header(Path(folder)).rows
    return TeacherCache.open(
        folder,
        side.view,
        data_fingerprint=rows_fingerprint(rows[:count]),
        template_fingerprint=template_fingerprint(side, template),
    )


def check_rows(cache: TeacherCache, features: Sequence[Features], nth: int) -> None:
    """See that what the run's `nth` teacher reads of each row begins what the cache has of it.

    BadArtifact for the first row that does not, or is not there.
    """
    for row in features:
        ids, there = row.teachers[nth].ids, cache.token_ids(row.row)
        if len(ids) > len(there):
            problem = f"row {row.row} has {len(there)} tokens there, and the run reads {len(ids)}"
            fix = f"lower the run's --max-length to {cache.header.max_length}, or make another cache with a longer one"
            raise BadArtifact(cache.folder, problem, fix)
        differs = np.flatnonzero(there[: len(ids)] != ids)
        if len(differs):
            at = int(differs[0])
            problem = (
                f"row {row.row} reads otherwise: its token {at + 1} is {there[at]} there and {ids[at]} now"
            )
            raise BadArtifact(cache.folder, problem, "make another cache of this data: cdm teacher cache")


class CachedTeacher:
    """Says what is in a cache: a `Teacher` without a model."""

    def __init__(self, cache: TeacherCache, *, k: int, device: str | torch.device = "cpu") -> None:
        """Say the `k` likeliest ids. BadOption where the cache has fewer."""
        if k > cache.k:
            allowed = f"at most {cache.k}: {cache.folder} has no more; or make another cache with -k {k}"
            raise BadOption("top_k", k, allowed)
        self.cache, self.k, self.device = cache, k, torch.device(device)

    def says(self, batch: TeacherBatch, rows: Sequence[int]) -> TeacherSays:
        """Look up the places that a batch reads in the rows of these numbers."""
        whole_tokens = "group" in batch
        places = batch["places"].cpu().numpy()
        first = batch["first"].cpu().numpy() if whole_tokens else np.arange(len(places))
        tops: list[tuple[Tensor, Tensor]] = []
        tokens: list[np.ndarray] = []
        end = 0
        for number, count in zip(rows, batch["counts"], strict=True):
            begin, end = end, end + count
            if not count:
                continue
            row = self.cache.row(number)
            at = self._positions(row, places[begin:end])
            tops.append(self._top(row, at[first[(first >= begin) & (first < end)] - begin]))
            tokens.append(row.token_logprobs[at])
        ids, logprobs = (torch.cat(each).to(self.device) for each in zip(*tops, strict=True))
        top = TopK(ids, logprobs)
        if not whole_tokens:
            return TeacherSays(top)
        said = torch.from_numpy(np.concatenate(tokens)).to(self.device)
        return TeacherSays(top, said, batch["group"].to(self.device))

    def _positions(self, row: CachedRow, places: np.ndarray) -> np.ndarray:
        """Turn places in the row's tokens into positions of the cache."""
        at = places - row.first
        if at.min() < 0 or at.max() >= len(row.token_logprobs):
            problem = f"row {row.number} has positions {row.first} to {len(row.token_ids) - 2} there"
            fix = "make another cache of this data: cdm teacher cache"
            raise BadArtifact(
                self.cache.folder, f"{problem}, the run asks for {places.min()} to {places.max()}", fix
            )
        return at

    def _top(self, row: CachedRow, at: np.ndarray) -> tuple[Tensor, Tensor]:
        if self.cache.header.encoding == "whole":
            best = torch.from_numpy(row.logprobs[at]).topk(self.k, dim=-1)
            return best.indices, best.values
        ids, logprobs = row.ids[at, : self.k], row.logprobs[at, : self.k]
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(np.ascontiguousarray(logprobs))
