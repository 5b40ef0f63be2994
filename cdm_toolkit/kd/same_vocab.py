"""Teacher and student of one tokenizer: divergences over the same ids, no mapping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cdm_toolkit.kd.divergences import kd_sums, outcomes
from cdm_toolkit.kd.method import Method
from cdm_toolkit.kd.settings import MethodSettings, beta_setting, temperature_setting, top_k_setting
from cdm_toolkit.kd.types import NOT_USED, Comparison, KDSums, LogprobRequest, StudentLogits, TeacherSignal
from cdm_toolkit.vocab_map.types import NO_MATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class SameVocabSettings(MethodSettings):
    """Settings of `KL` and `ReverseKL`."""

    temperature: float = temperature_setting()
    top_k: int | None = top_k_setting()


@dataclass(frozen=True, slots=True, kw_only=True)
class JSDSettings(SameVocabSettings):
    """Settings of `JSD`."""

    beta: float = beta_setting()


class SameVocab(Method[SameVocabSettings, None]):
    """T² D(teacher, student) over the teacher's top k and all other ids as one outcome.

    Where k is the vocabulary nothing is left for the one outcome and D is exact; where it is less, D is at
    most what it is over all ids. Subclasses say which divergence D is.
    """

    Settings: ClassVar[type[MethodSettings]] = SameVocabSettings
    same_tokenizer = True

    def divergence(
        self, teacher: Float[Tensor, "group outcome"], student: Float[Tensor, "group outcome"]
    ) -> Float[Tensor, " group"]:
        """Give D of two distributions in logarithms, in nats."""
        raise NotImplementedError

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[None]:
        return LogprobRequest.at_groups(student, signal.top.ids, NOT_USED)

    def compare(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[None], signal: TeacherSignal
    ) -> Comparison:
        top, mask = signal.top, signal.top.logprobs > -torch.inf
        student = logprobs.view_as(top.logprobs)
        of_both = self._outcomes(top.logprobs, mask), self._outcomes(student, mask)
        divergence = self.settings.temperature**2 * self.divergence(*of_both)
        ids = torch.where(mask, top.ids, NO_MATCH)
        return Comparison(request.rows.view_as(ids).select(1, 0), ids, top.logprobs, student, divergence)

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[None], signal: TeacherSignal
    ) -> KDSums:
        compared = self.compare(logprobs, request, signal)
        return kd_sums(compared.divergence, signal.top.logprobs, signal.top.logprobs > -torch.inf)

    def _outcomes(
        self, logprobs: Float[Tensor, "group topk"], mask: Bool[Tensor, "group topk"]
    ) -> Float[Tensor, "group outcome"]:
        rest = logprobs.shape[1] < self.pair.vocab_s
        return outcomes(logprobs, mask, temperature=self.settings.temperature, rest_bucket=rest)
