"""The next byte: what both models say of it at a boundary, whatever token it begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cdm_toolkit.kd.byte_lattice import OUTCOMES
from cdm_toolkit.kd.divergences import kd_sums
from cdm_toolkit.kd.method import Method, as_buffer
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.settings import MethodSettings, top_k_setting
from cdm_toolkit.kd.types import NOT_USED, KDSums, LogprobRequest, StudentLogits, TeacherSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteMarginalSettings(MethodSettings):
    """Settings of `ByteMarginal`."""

    top_k: int | None = top_k_setting()


class ByteMarginal(Method[ByteMarginalSettings, None]):
    """KL(teacher ‖ student) over the next byte: P(b) = Σ of p(i) over the ids i whose bytes begin with b.

    The outcomes are the 256 bytes, and that the text ends or a special token follows. P(b) is the first step of the
    distribution over bytes that arXiv 2412.03719 and 2506.14123 define, after the tokens that the model has read.

    - Exact for the student: all ids of its vocabulary are summed up. That takes a log-probability of each id at
      each group, which is why the method is for small cases.
    - Exact for the teacher where its top k are all ids. Else P is the distribution nearest to the student's of those
      that the top k allow: a byte has at least what its candidates add up to, and the remaining probability
      stands wherever the student has its own. So it teaches nothing that the signal does not say.
    - Not over other tokenizations of the text before the boundary, which the definitions also sum up: the tokens
      that were read are taken as given. `byte_lattice` sums over them, by runs of the model that a loss has not.
    - One byte at each boundary. What follows it in the same token is not compared, nor are positions within groups.

    `matched_mass` and `pairs` are those of the candidates.
    """

    name = "byte-marginal"
    summary = "KL over the next byte at each boundary, summed over all student ids: for small cases"
    source = "arXiv 2412.03719, 2506.14123"
    Settings = ByteMarginalSettings
    color, marker = "#5c7a00", "*"

    first_t: Tensor
    """int64 [vocab_t]: the first byte of each id, `byte_lattice.END` for one without bytes."""
    first_s: Tensor
    """int64 [vocab_s]: the same of the student's."""

    def build_tables(self, pair: TokenizerPair) -> None:
        first_t, first_s = pair.first_bytes()
        self.register_buffer("first_t", as_buffer(first_t), persistent=False)
        self.register_buffer("first_s", as_buffer(first_s), persistent=False)

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[None]:
        every = torch.arange(student.vocab, device=student.rows.device)
        return LogprobRequest.at_groups(
            student, every.unsqueeze(0).expand(len(student.rows), student.vocab), NOT_USED
        )

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[None], signal: TeacherSignal
    ) -> KDSums:
        groups, tiny = len(signal.top.ids), torch.finfo(logprobs.dtype).tiny
        of_ids = logprobs.view(groups, len(self.first_s)).exp()
        student = of_ids.new_zeros(groups, OUTCOMES).index_add(1, self.first_s, of_ids).clamp(min=tiny)
        first = self.first_t.index_select(0, signal.top.ids.flatten()).view_as(signal.top.ids)
        least = torch.zeros_like(student).scatter_add(1, first, signal.top.logprobs.exp().to(student.dtype))
        teacher = nearest_above(least, student.detach())
        divergence = (torch.xlogy(teacher, teacher) - teacher * student.log()).sum(-1)
        return kd_sums(divergence, signal.top.logprobs, signal.top.logprobs > -torch.inf)


def nearest_above(
    least: Float[Tensor, "group outcome"], q: Float[Tensor, "group outcome"]
) -> Float[Tensor, "group outcome"]:
    """Give the distribution p of least KL(p ‖ q) among those with p ≥ `least`, which sums to at most one.

    It is max(least, λ q): for each number of outcomes that stay at `least`, those with the most of it beside q,
    some λ makes the sum one, and the smallest of these is the right one.

    >>> nearest_above(torch.tensor([[0.5, 0.1, 0.0]]), torch.tensor([[0.2, 0.4, 0.4]]))
    tensor([[0.5000, 0.2500, 0.2500]])
    """
    order = (least / q).sort(-1, descending=True).indices
    kept, others = (side.gather(-1, order) for side in (least, q))
    rest = 1 - (kept.cumsum(-1) - kept)
    total = others.flip(-1).cumsum(-1).flip(-1)
    scale = (rest.clamp(min=0) / total).amin(-1, keepdim=True)
    return torch.maximum(least, scale * q)
