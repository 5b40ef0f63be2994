"""KL over a mapping of the vocabularies that is the same at every position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
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
    temperature_setting,
    top_k_setting,
)
from cdm_toolkit.kd.types import Comparison, KDSums, LogprobRequest, StudentLogits, TeacherSignal, TopK
from cdm_toolkit.vocab_map.types import NO_MATCH, VocabMap


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticMapSettings(MethodSettings):
    """Settings of `ExactMatch` and `Prefix`."""

    temperature: float = temperature_setting()
    top_k: int | None = top_k_setting()
    positions: Positions = positions_setting()
    rest_bucket: bool = rest_bucket_setting()
    divergence: Divergence = divergence_setting()
    beta: float = beta_setting()


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Student ids that the teacher's candidates map to, with the teacher's probability of each.

    `has_partner` marks the candidates that map to one.
    """

    teacher: TopK
    has_partner: Bool[Tensor, "group topk"]


class StaticMap(Method[StaticMapSettings, Outcomes]):
    """T² KL(teacher ‖ student) over the student ids that the teacher's top k map to.

    Teacher candidates that map to one student id are one outcome with the sum of their probabilities. Both
    distributions are renormalised over the outcomes at temperature T, with all other probability as one more
    where `rest_bucket` is set. Subclasses say which map.
    """

    Settings: ClassVar[type[MethodSettings]] = StaticMapSettings
    needs_match = True

    partner: Tensor

    def build_map(self, pair: TokenizerPair) -> VocabMap:
        """Build the map from teacher ids to student ids."""
        raise NotImplementedError

    def build_tables(self, pair: TokenizerPair) -> None:
        self.register_buffer("partner", as_buffer(self.build_map(pair).dense()), persistent=False)

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[Outcomes]:
        partners = partners_of(signal.top, self.partner)
        teacher = merged(signal.top, partners)
        return LogprobRequest.at_groups(student, teacher.ids.clamp(min=0), Outcomes(teacher, partners >= 0))

    def compare(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[Outcomes], signal: TeacherSignal
    ) -> Comparison:
        teacher = request.state.teacher
        student = logprobs.view_as(teacher.logprobs)
        divergence = bucket_divergence(
            teacher.logprobs,
            student,
            teacher.ids >= 0,
            temperature=self.settings.temperature,
            rest_bucket=self.settings.rest_bucket,
            divergence=self.settings.divergence,
            beta=self.settings.beta,
        )
        rows = request.rows.view_as(teacher.ids).select(1, 0)
        return Comparison(rows, teacher.ids, teacher.logprobs, student, divergence)

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[Outcomes], signal: TeacherSignal
    ) -> KDSums:
        compared = self.compare(logprobs, request, signal)
        return kd_sums(compared.divergence, signal.top.logprobs, request.state.has_partner)


def partners_of(top: TopK, partner: Int64[Tensor, " vocab_t"]) -> Int64[Tensor, "group topk"]:
    """Look up the partner of each candidate, −1 where it has none or no probability."""
    found = partner.index_select(0, top.ids.flatten()).view_as(top.ids)
    return torch.where(top.logprobs > -torch.inf, found, NO_MATCH)


def merged(top: TopK, partners: Int64[Tensor, "group topk"]) -> TopK:
    """Make one outcome of the candidates with one partner: its id, and the log of their joint probability.

    The outcomes of a group come in ascending order of their ids; −1 stands for candidates without a partner,
    and fills up.
    """
    in_order = partners.sort(-1)
    same = in_order.values.diff(dim=-1, prepend=in_order.values.narrow(-1, 0, 1)) == 0
    slots = same.logical_not().cumsum(-1)
    probabilities = top.logprobs.gather(-1, in_order.indices).exp()
    mass = torch.zeros_like(probabilities).scatter_add(-1, slots, probabilities)
    ids = torch.full_like(partners, NO_MATCH).scatter(-1, slots, in_order.values)
    return TopK(ids, mass.clamp(min=torch.finfo(mass.dtype).tiny).log())
