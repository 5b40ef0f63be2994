"""Universal Logit Distillation (arXiv 2402.12030): sorted probabilities, whatever ids they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cdm_toolkit.kd.divergences import kd_sums, tempered
from cdm_toolkit.kd.method import Method
from cdm_toolkit.kd.settings import (
    MethodSettings,
    Positions,
    positions_setting,
    setting,
    top_k_setting,
)
from cdm_toolkit.kd.sparse_logprobs import top_k
from cdm_toolkit.kd.types import KDSums, LogprobRequest, StudentLogits, TeacherSignal, TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class ULDSettings(MethodSettings):
    """Settings of `ULD`."""

    temperature: float = setting(1.0, "Softmax temperature of both distributions.", above=0)
    top_k: int | None = top_k_setting()
    positions: Positions = positions_setting()


class ULD(Method[ULDSettings, TopK]):
    """Σ over ranks i of |p_(i) − q_(i)|, the sorted probabilities of teacher and student at temperature T.

    This is the closed form of the Wasserstein distance with a uniform cost (Boizard et al., arXiv 2402.12030), a
    number from 0 to 2, with no T². It differs from the publication in two things:

    - Ranks beyond k are left out. With p and q of mass P and Q beyond k, that is at least |P − Q| and at most
      P + Q, and the student's tail has no gradient of its own. At k of the whole vocabularies nothing is.
      A temperature other than 1 takes all probability beyond k as one outcome.
    - Positions are the aligned groups, where the published one pairs the n-th token with the n-th.

    `matched_mass` is the teacher's probability on the ranks that both sides have, `pairs` counts them.
    """

    name = "uld"
    summary = "L1 distance of the sorted probabilities, without a map"
    source = "arXiv 2402.12030"
    Settings = ULDSettings
    color, marker = "#cc79a7", "D"

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[TopK]:
        top = top_k(student.logits, self.top_k, real=student.vocab, rows=student.rows, lse=student.lse)
        return LogprobRequest.at_groups(student, top.ids, top)

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[TopK], signal: TeacherSignal
    ) -> KDSums:
        teacher, ranks_s = signal.top, request.state.ids.shape[1]
        possible = teacher.logprobs > -torch.inf
        compared = possible & (torch.arange(teacher.ids.shape[1], device=teacher.ids.device) < ranks_s)
        p = self._tempered(teacher.logprobs, self.pair.vocab_t)
        q = self._tempered(logprobs.view_as(request.state.ids), self.pair.vocab_s)
        return kd_sums(sorted_l1(p.exp(), q.exp()), teacher.logprobs, compared)

    def _tempered(self, logprobs: Float[Tensor, "group topk"], vocab: int) -> Float[Tensor, "group topk"]:
        return tempered(
            logprobs,
            logprobs > -torch.inf,
            temperature=self.settings.temperature,
            complete=logprobs.shape[1] == vocab,
        )


def sorted_l1(
    teacher: Float[Tensor, "group topk_t"], student: Float[Tensor, "group topk_s"]
) -> Float[Tensor, " group"]:
    """Sum |teacher − student| over the ranks of descending probabilities; the shorter side ends in zeros."""
    width = max(teacher.shape[-1], student.shape[-1])
    sides = [torch.nn.functional.pad(side, (0, width - side.shape[-1])) for side in (teacher, student)]
    return (sides[0] - sides[1]).abs().sum(-1)
