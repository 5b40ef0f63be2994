"""Contextual Dynamic Mapping (arXiv 2502.11104): pairs of ids chosen anew at each position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cdm_toolkit.kd.divergences import bucket_divergence, kd_sums
from cdm_toolkit.kd.method import Method, as_buffer
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.settings import (
    Divergence,
    MethodSettings,
    Positions,
    beta_setting,
    divergence_setting,
    positions_setting,
    rest_bucket_setting,
    setting,
    temperature_setting,
    top_k_setting,
)
from cdm_toolkit.kd.sparse_logprobs import top_k, values_at
from cdm_toolkit.kd.types import Comparison, KDSums, LogprobRequest, StudentLogits, TeacherSignal, TopK
from cdm_toolkit.vocab_map.contextual import Pairs, PairTable, select_pairs
from cdm_toolkit.vocab_map.types import NO_MATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class CDMSettings(MethodSettings):
    """Settings of `CDM`."""

    temperature: float = temperature_setting()
    top_k: int | None = top_k_setting()
    positions: Positions = positions_setting()
    rest_bucket: bool = rest_bucket_setting()
    divergence: Divergence = divergence_setting()
    beta: float = beta_setting()
    max_edit_distance: float = setting(
        0.3, "Ids are near with an edit distance below this share of their joint length.", above=0, below=1
    )
    match_digits: bool = setting(True, "Never pair tokens whose digits or operators differ.")
    both_directions: bool = setting(True, "Look for near ids from the student's candidates too.")
    exact_always: bool = setting(
        True,
        "Pair an id with the same bytes even where that is outside the student's top k: without it an untrained "
        "student has next to no pairs.",
    )


class CDM(Method[CDMSettings, Pairs]):
    """T² KL(teacher ‖ student) on pairs chosen at each position (arXiv 2502.11104, section 3.3).

    The pairs are selected among the top k of both models by edit distance; both distributions are renormalised
    over the pairs at temperature T, with the unmatched probability as one more outcome where `rest_bucket` is
    set. The paper's own settings are the preset `paper`.
    """

    name = "cdm"
    summary = "KL over pairs of ids of small edit distance, chosen anew at each position"
    source = "arXiv 2502.11104"
    Settings = CDMSettings
    color, marker = "#d55e00", "p"
    needs_match = True

    partner_ids: Tensor
    partner_keys: Tensor
    exact: Tensor

    def build_tables(self, pair: TokenizerPair) -> None:
        settings = self.settings
        table = pair.near_ids(
            max_edit_distance=settings.max_edit_distance,
            match_digits=settings.match_digits,
            both_directions=settings.both_directions,
        )
        self.register_buffer("partner_ids", table.partner_ids, persistent=False)
        self.register_buffer("partner_keys", table.partner_keys, persistent=False)
        self.register_buffer("exact", as_buffer(pair.exact()), persistent=False)

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[Pairs]:
        top = top_k(student.logits, self.top_k, real=student.vocab, rows=student.rows, lse=student.lse)
        if self.settings.exact_always:
            logprobs = partial(_logprobs, student)
            top = with_exact_partners(top, signal.top, self.exact, logprobs, student.vocab)
        table = PairTable(self.partner_ids, self.partner_keys, self.pair.vocab_s)
        pairs = select_pairs(table, signal.top.ids, signal.top.logprobs, top.ids, top.logprobs)
        # a pair for each of the teacher's candidates; where there is none the mask keeps id 0 out of everything
        return LogprobRequest.at_groups(student, pairs.student_ids.clamp(min=0), pairs)

    def compare(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[Pairs], signal: TeacherSignal
    ) -> Comparison:
        teacher, mask = signal.top.logprobs, request.state.mask
        student = logprobs.view_as(teacher)
        divergence = bucket_divergence(
            teacher,
            student,
            mask,
            temperature=self.settings.temperature,
            rest_bucket=self.settings.rest_bucket,
            divergence=self.settings.divergence,
            beta=self.settings.beta,
        )
        ids = torch.where(mask, request.state.student_ids, NO_MATCH)
        return Comparison(request.rows.view_as(ids).select(1, 0), ids, teacher, student, divergence)

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[Pairs], signal: TeacherSignal
    ) -> KDSums:
        compared = self.compare(logprobs, request, signal)
        return kd_sums(compared.divergence, signal.top.logprobs, request.state.mask)


def with_exact_partners(
    student: TopK,
    teacher: TopK,
    exact: Int64[Tensor, " vocab_t"],
    logprobs: Callable[[Tensor], Tensor],
    size: int,
) -> TopK:
    """Add the exact partners of the teacher's candidates to the student's, most likely first; −1 fills up.

    `logprobs` gives the student's log-probabilities of ids [group, topk]; its vocabulary has `size` ids.
    """
    partners = exact.index_select(0, teacher.ids.flatten()).view_as(teacher.ids)
    in_order = student.ids.sort(-1).values
    at = torch.searchsorted(in_order, partners).clamp(max=in_order.shape[-1] - 1)
    new = (partners >= 0) & (in_order.gather(-1, at) != partners)
    added = torch.where(new, logprobs(partners.clamp(min=0)), -torch.inf)
    ids = torch.cat((student.ids, torch.where(new, partners, -1)), dim=-1)
    order = torch.cat((student.logprobs, added), dim=-1).sort(dim=-1, descending=True, stable=True)
    width = min(size, ids.shape[1])
    return TopK(ids.gather(-1, order.indices.narrow(1, 0, width)), order.values.narrow(1, 0, width))


def _logprobs(student: StudentLogits, ids: Int64[Tensor, "group topk"]) -> Float[Tensor, "group topk"]:
    rows = student.rows.repeat_interleave(ids.shape[1])
    picked = values_at(student.logits, rows, ids.flatten()) - student.lse.index_select(0, rows)
    return picked.view_as(ids)
