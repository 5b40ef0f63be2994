"""SimCT (arXiv 2605.07711): shared tokens, and the text that both write in several tokens as one more outcome."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cdm_toolkit.kd.divergences import FULL, NOTHING, first_and_count, group_sums, kd_sums, kl
from cdm_toolkit.kd.method import Method, as_buffer
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.settings import (
    MethodSettings,
    rest_bucket_setting,
    setting,
    temperature_setting,
    top_k_setting,
)
from cdm_toolkit.kd.static_map import merged, partners_of
from cdm_toolkit.kd.types import Comparison, KDSums, LogprobRequest, StudentLogits, TeacherSignal, TopK
from cdm_toolkit.vocab_map.types import NO_MATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class SimCTSettings(MethodSettings):
    """Settings of `SimCT`."""

    temperature: float = temperature_setting()
    top_k: int | None = top_k_setting()
    rest_bucket: bool = rest_bucket_setting()
    reverse_kl: bool = setting(True, "Take KL(student ‖ teacher), as on text that the student sampled.")


@dataclass(frozen=True, slots=True, eq=False)
class SharedOutcomes:
    """Student ids that the teacher's candidates share, and the tokens of each group.

    `first_t` is the log-probability of a group's first teacher token, `first_s` the id of its first student token;
    `unclaimed_*` mark groups of several tokens whose first is no shared outcome.
    """

    teacher: TopK
    has_partner: Bool[Tensor, "group topk"]
    is_unit: Bool[Tensor, " group"]
    """Whether the group's tokens together are one more outcome."""
    unit_t: Float[Tensor, " group"]
    """Mean log-probability of the group's teacher tokens."""
    first_t: Float[Tensor, " group"]
    unclaimed_t: Bool[Tensor, " group"]
    first_s: Int64[Tensor, " group"]
    unclaimed_s: Bool[Tensor, " group"]
    token_group: Int64[Tensor, " token_s"]


class SimCT(Method[SimCTSettings, SharedOutcomes]):
    """T² KL(q ‖ p) over the ids with the same bytes and, at a group of several tokens, the group as one more outcome.

    Where both write a group in one token, p and q are the two distributions over the shared ids, renormalised.
    Where one of them needs several, the group's text is an outcome beside these: its probability is the geometric
    mean of those of its tokens, of each model's own (arXiv 2605.07711; `span_ctkd` of the authors' code). The shared
    ids are read at the boundary before the group alone. The differences:

    - Shared are the teacher's k candidates with a partner. What is left is one more outcome (`rest_bucket`), but for
      the first token of a group of several, which the group stands for. The publication has no such outcome, and
      ours is the same with `rest_bucket` off and k of the whole vocabularies.
    - The mean is that of log-probabilities. The authors' code takes the mean of logits, of which only differences at
      one position are defined: add a constant to all logits of a group's second token, which changes no probability,
      and its loss changes. The two are the same on log-probabilities.
    - Groups are the smallest, as the publication defines its units. The authors' code ends a group only at a token
      that both have, and adds that token to it.
    - Ids match by bytes or role, not by the strings of the vocabulary files.
    - Temperature comes with T², as in all methods here.

    `matched_mass` and `pairs` are those of teacher candidates with a partner.
    """

    name = "simct"
    summary = "reverse KL over ids with the same bytes, and a text of several tokens as one outcome"
    source = "arXiv 2605.07711"
    Settings = SimCTSettings
    color, marker = "#8787ff", "H"
    reads_teacher_tokens = True
    reads_student_tokens = True

    partner: Tensor
    """int64 [vocab_t]: the student id with the same bytes or role, −1 for none."""

    def build_tables(self, pair: TokenizerPair) -> None:
        self.register_buffer("partner", as_buffer(pair.exact()), persistent=False)

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[SharedOutcomes]:
        assert student.token_rows is not None
        assert student.token_ids is not None
        shared = self._shared(student, signal)
        first = LogprobRequest.at_groups(student, shared.teacher.ids.clamp(min=0), shared)
        return LogprobRequest(
            torch.cat((first.rows, student.token_rows)), torch.cat((first.ids, student.token_ids)), shared
        )

    def _shared(self, student: StudentLogits, signal: TeacherSignal) -> SharedOutcomes:
        assert signal.token_logprobs is not None
        assert signal.token_group is not None
        assert signal.token_ids is not None
        assert student.token_ids is not None
        assert student.token_group is not None
        groups = len(signal.top.ids)
        partners = partners_of(signal.top, self.partner)
        teacher = merged(signal.top, partners)
        first_t, count_t = first_and_count(signal.token_group, groups)
        first_s, count_s = first_and_count(student.token_group, groups)
        several_t, several_s = count_t > 1, count_s > 1
        unit = _mean(signal.token_logprobs, signal.token_group, groups)
        is_unit = (several_t | several_s) & (unit > NOTHING)
        id_t = signal.token_ids.index_select(0, first_t).unsqueeze(-1)
        id_s = student.token_ids.index_select(0, first_s)
        return SharedOutcomes(
            teacher=teacher,
            has_partner=partners >= 0,
            is_unit=is_unit,
            unit_t=unit,
            first_t=signal.token_logprobs.index_select(0, first_t),
            unclaimed_t=is_unit & ((signal.top.ids == id_t) & (partners >= 0)).any(-1).logical_not(),
            first_s=id_s,
            unclaimed_s=is_unit & (teacher.ids == id_s.unsqueeze(-1)).any(-1).logical_not(),
            token_group=student.token_group,
        )

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[SharedOutcomes], signal: TeacherSignal
    ) -> KDSums:
        teacher, student = self._sides(logprobs, request.state, self.settings.temperature)
        return kd_sums(self._divergence(teacher, student), signal.top.logprobs, request.state.has_partner)

    def compare(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[SharedOutcomes], signal: TeacherSignal
    ) -> Comparison:
        """Give both distributions over student ids; a group's text is a part of its first token."""
        shared = request.state
        divergence = self._divergence(*self._sides(logprobs, shared, self.settings.temperature))
        added = torch.where(shared.unclaimed_s, shared.first_s, NO_MATCH).unsqueeze(-1)
        ids = torch.cat((shared.teacher.ids, added), dim=-1)
        teacher, student = (
            _at_first_token(side, ids, shared) for side in self._sides(logprobs, shared, temperature=1.0)
        )
        rows = request.rows.narrow(0, 0, shared.teacher.ids.numel()).view_as(shared.teacher.ids).select(1, 0)
        return Comparison(rows, ids, teacher, student, divergence)

    def _divergence(
        self, teacher: Float[Tensor, "group outcome"], student: Float[Tensor, "group outcome"]
    ) -> Float[Tensor, " group"]:
        p, q = (student, teacher) if self.settings.reverse_kl else (teacher, student)
        return self.settings.temperature**2 * kl(p, q)

    def _sides(
        self, logprobs: Float[Tensor, " pick"], shared: SharedOutcomes, temperature: float
    ) -> tuple[Float[Tensor, "group outcome"], Float[Tensor, "group outcome"]]:
        """Give both distributions over the shared ids, the group's text and, where it is compared, the rest."""
        own, tokens = logprobs.split((shared.teacher.ids.numel(), len(shared.token_group)))
        groups = len(shared.first_s)
        first_s, _ = first_and_count(shared.token_group, groups)
        student = self._outcomes(
            own.view_as(shared.teacher.logprobs),
            _mean(tokens, shared.token_group, groups),
            tokens.index_select(0, first_s),
            shared.unclaimed_s,
            shared,
        )
        teacher = self._outcomes(
            shared.teacher.logprobs, shared.unit_t, shared.first_t, shared.unclaimed_t, shared
        )
        return (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)

    def _outcomes(
        self,
        own: Float[Tensor, "group topk"],
        unit: Float[Tensor, " group"],
        first: Float[Tensor, " group"],
        unclaimed: Bool[Tensor, " group"],
        shared: SharedOutcomes,
    ) -> Float[Tensor, "group outcome"]:
        kept = own.clamp(min=NOTHING).masked_fill(shared.teacher.ids < 0, NOTHING)
        unit = unit.masked_fill(shared.is_unit.logical_not(), NOTHING)
        every = [kept, unit.unsqueeze(-1)]
        if self.settings.rest_bucket:
            first = first.masked_fill(unclaimed.logical_not(), NOTHING).unsqueeze(-1)
            taken = torch.cat((kept, first), dim=-1).logsumexp(-1, keepdim=True).clamp(max=FULL)
            every.append(torch.log(-torch.expm1(taken)))
        return torch.cat(every, dim=-1)


def _mean(
    logprobs: Float[Tensor, " token"], group: Int64[Tensor, " token"], groups: int
) -> Float[Tensor, " group"]:
    """Average the log-probabilities of each group's tokens; NOTHING where one has none."""
    total = group_sums(logprobs, group, groups)
    return (total / group_sums(torch.ones_like(logprobs), group, groups)).clamp(min=NOTHING)


def _at_first_token(
    side: Float[Tensor, "group outcome"], ids: Int64[Tensor, "group topk"], shared: SharedOutcomes
) -> Float[Tensor, "group topk"]:
    """Add the probability of a group's text to that of its first token, or let it be that."""
    width = shared.teacher.ids.shape[1]
    own, unit = side.narrow(1, 0, width), side.narrow(1, width, 1)
    own = torch.nn.functional.pad(own, (0, 1), value=NOTHING)
    here = (ids == shared.first_s.unsqueeze(-1)) & shared.is_unit.unsqueeze(-1)
    return torch.where(here, torch.logaddexp(own, unit), own)
