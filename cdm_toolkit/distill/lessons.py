"""From a teacher's settings to what the training step asks: its distributions, and the method made of tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cdm_toolkit.artifacts.maps import load_or_build_neighbours
from cdm_toolkit.distill.cached_teacher import CachedTeacher, check_rows, open_cache
from cdm_toolkit.distill.data import side_of
from cdm_toolkit.distill.losses.methods import METHODS, Ingredients, build_method
from cdm_toolkit.distill.teacher import OnlineTeacher
from cdm_toolkit.distill.trainer import Lesson
from cdm_toolkit.vocab_map.contextual import PairTable
from cdm_toolkit.vocab_map.exact import build_exact
from cdm_toolkit.vocab_map.min_ed import build_min_ed
from cdm_toolkit.vocab_map.prefix import build_prefix
from cdm_toolkit.vocab_map.spelling import Spellings, build_spellings
from cdm_toolkit.vocab_map.types import NO_MATCH, Neighbours, NeighbourTable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from cdm_toolkit.distill.config import TeacherConfig, TemplateName
    from cdm_toolkit.distill.data import StoredFeatures
    from cdm_toolkit.distill.losses.record import Method
    from cdm_toolkit.distill.rows import Row
    from cdm_toolkit.distill.teacher import Teacher
    from cdm_toolkit.hub.tokenizers import Loaded
    from cdm_toolkit.tokdiff.view import TokenizerView


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What the `nth` teacher of a run reads."""

    nth: int
    features: StoredFeatures
    rows: Sequence[Row]
    template: TemplateName


def build_lesson(
    config: TeacherConfig,
    tokenizer: Loaded,
    student: Loaded,
    rows: Rows,
    *,
    model: Callable[[], PreTrainedModel],
    device: str,
    workers: int,
    progress: Callable[[int, int], None],
) -> Lesson:
    """Open a teacher's cache, or load its `model`, and build its method for the student's tokenizer.

    Raises what the cache and the tables raise.
    """
    k = _candidates(config, tokenizer, student) if METHODS[config.variant].needs_top_k else 1
    teacher: Teacher
    if config.cache is not None:
        cache = open_cache(config.cache, side_of(tokenizer), rows.rows, rows.template)
        check_rows(cache, rows.features, rows.nth)
        k = k if config.top_k else min(k, cache.k)
        teacher = CachedTeacher(cache, k=k, device=device)
    else:
        teacher = OnlineTeacher(
            model(), vocab_t=tokenizer.view.vocab_size, k=k, mean=config.positions == "mean"
        )
    method = _method(config, tokenizer.view, student.view, k, device, workers, progress)
    return Lesson(config.model, teacher, method, config.weight)


def _candidates(config: TeacherConfig, tokenizer: Loaded, student: Loaded) -> int:
    return min(config.candidates, tokenizer.view.vocab_size, student.view.vocab_size)


def _method(
    config: TeacherConfig,
    view_t: TokenizerView,
    view_s: TokenizerView,
    k: int,
    device: str,
    workers: int,
    progress: Callable[[int, int], None],
) -> Method:
    """Build the tables that the method is made of: a static map, pairs, or neither."""
    import torch

    tables = METHODS[config.variant].tables
    spelling = beginning = None
    partner = exact = build_exact(view_t, view_s) if "exact" in tables else None
    pairs = None
    if "neighbours" in tables:
        assert exact is not None
        near = load_or_build_neighbours(
            view_t,
            view_s,
            max_edit_distance=config.max_edit_distance,
            match_digits=config.match_digits,
            workers=workers,
            progress=progress,
        )
        if not config.both_directions:
            near = _one_direction(near)
        pairs = PairTable.from_tables(exact, near).to(device)
        partner = exact if config.exact_always else None
    elif "mined" in tables:
        partner = build_min_ed(
            view_t, view_s, match_digits=config.match_digits, workers=workers, progress=progress
        )
    elif "prefix" in tables:
        partner = build_prefix(view_t, view_s)
    elif "spellings" in tables:
        spelling, beginning = _spelling(build_spellings(view_t, view_s), device)
        beginning = beginning if config.both_directions else None
    ingredients = Ingredients(
        vocab_t=view_t.vocab_size,
        vocab_s=view_s.vocab_size,
        partner=None if partner is None else torch.from_numpy(partner.dense()).to(device),
        pairs=pairs,
        spelling=spelling,
        beginning=beginning,
        inside=config.inside,
        temperature=config.temperature,
        top_k=k,
        rest_bucket=config.rest_bucket,
        beta=config.beta,
        tau=config.tau,
    )
    return build_method(config.variant, ingredients)


def _spelling(spellings: Spellings, device: str) -> tuple[Tensor, Tensor]:
    """Put the tables on the device; gives also which student id stands for the beginning of each."""
    import torch

    of_t, of_s = (torch.from_numpy(ids).to(device, torch.int64) for ids in (spellings.of_t, spellings.of_s))
    return of_t, torch.where(of_s >= 0, of_t[of_s.clamp(min=0), 0], NO_MATCH)


def _one_direction(near: NeighbourTable) -> NeighbourTable:
    """Leave out the neighbours of the student's ids."""
    none = np.zeros(0, np.int32)
    empty = Neighbours(np.zeros(near.size_s + 1, np.int64), none, none.astype(np.float32), none)
    return replace(near, s_to_t=empty)
