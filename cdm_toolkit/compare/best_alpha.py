"""Each method at the best of its alphas, chosen on rows apart from those that are reported. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from cdm_toolkit.compare.table import gaps_of, mean_share
from cdm_toolkit.compare.types import RINGS, ModelScores, StudyResult


def at_best_alphas(result: StudyResult) -> StudyResult:
    """Take each method at the alpha that closes most of the gap on `select_alpha_on`; its others become its line.

    That is the mean of the shares over the rings of these rows and over the seeds, among the alphas that have most
    seeds so far; the lower alpha of two that are equal. A study without such rows, or without a gap on them, stays
    as it is.
    """
    gaps = gaps_of(replace(result, start=_selection(result.start), teacher=_selection(result.teacher)))
    scores: defaultdict[str, defaultdict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in result.cells:
        if (score := mean_share(_selection(each.scores), gaps)) is not None:
            scores[each.cell.method][each.cell.alpha].append(score)
    if not scores:
        return result
    best = {method: _best(of_method) for method, of_method in scores.items()}
    cells = (replace(each.cell, in_curve=each.cell.alpha != best[each.cell.method]) for each in result.cells)
    judged = (replace(each, cell=cell) for each, cell in zip(result.cells, cells, strict=True))
    return replace(result, cells=tuple(judged))


def _selection(scores: ModelScores) -> ModelScores:
    """Put the rows to choose on in the place of those that are reported."""
    rings: dict[str, Any] = {
        ring: {kind: of_kind for kind, of_kind in scores.select_alpha_on.items() if kind in scores.on(ring)}
        for ring in RINGS
    }
    return replace(scores, **rings)


def _best(scores: Mapping[float, Sequence[float]]) -> float:
    most = max(map(len, scores.values()))
    means = {alpha: fmean(runs) for alpha, runs in scores.items() if len(runs) == most}
    return max(sorted(means), key=means.__getitem__)
