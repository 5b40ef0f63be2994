"""GOLD: ids with the same bytes are compared directly, the others by rank, on groups of whole tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cdm_toolkit.kd.divergences import NOTHING, generalised_jsd, group_sums, kd_sums, tempered
from cdm_toolkit.kd.method import Method, as_buffer
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.settings import MethodSettings, beta_setting, setting, top_k_setting
from cdm_toolkit.kd.sparse_logprobs import top_k
from cdm_toolkit.kd.static_map import merged, partners_of
from cdm_toolkit.kd.types import KDSums, LogprobRequest, StudentLogits, TeacherSignal, TopK
from cdm_toolkit.kd.uld import sorted_l1
from cdm_toolkit.vocab_map.types import NO_MATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class GOLDSettings(MethodSettings):
    """Settings of `GOLD`."""

    temperature: float = setting(1.0, "Softmax temperature of the first token's distribution.", above=0)
    top_k: int | None = top_k_setting()
    beta: float = beta_setting()


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Outcomes of each group: first the matched, as many as the teacher's k, then those that go by rank.

    −1 fills up on both sides. `whole_t` and `whole_s` say that nothing of the vocabulary is left out.
    """

    teacher: TopK
    ids_s: Int64[Tensor, "group outcome_s"]
    has_partner: Bool[Tensor, "group topk_t"]
    """Of the teacher's candidates."""
    whole_t: bool
    whole_s: bool
    token_group: Int64[Tensor, " token_s"] | None


class GOLD(Method[GOLDSettings, Candidates]):
    """w JSD_β(P, Q) over matched ids + v Σ |P_(i) − Q_(i)| over the ranks of the unmatched ones.

    P(y) of a group of tokens x₁ … xₙ is p(y | before) · p(x₂ | x₁) · … · p(xₙ | … xₙ₋₁): the distribution of
    the first token, times the probabilities of the other tokens that really follow. It does not sum to 1. Q is
    the student's, of its own tokens (TRL's GOLD trainer, `ULDLoss` with `uld_use_hybrid_loss`). Ids match by
    bytes or role; w is their share of the teacher's vocabulary and v = 1 − w. The differences to TRL's:

    - Matched are the teacher's top k, and by rank go the unmatched among the top k of each side, not all ids.
      The probability that is left is in no sum. At k of the vocabularies nothing is left.
    - Ids match by their bytes, not by the strings of the vocabulary files, in which one byte-level BPE and one
      SentencePiece model have few in common; teacher ids with one partner are one outcome, with their sum.
    - The temperature is that of the first token's distribution (all that is not read is one outcome in it). The
      tokens that follow count at temperature 1, and are not cut at a probability of 1e-8.
    - β is between 0 and 1: with P that does not sum to 1, TRL's β = 0 and β = 1 are no divergences.
    - Groups lie between the boundaries that both tokenizers share; end-of-text is a group like others.

    `matched_mass` and `pairs` are of the first token's distribution.
    """

    name = "gold"
    summary = "generalised JSD over ids with the same bytes, L1 by rank over the others"
    source = "TRL's GOLD trainer"
    Settings = GOLDSettings
    color, marker = "#7e39e6", "P"
    reads_teacher_tokens = True
    reads_student_tokens = True

    partner: Tensor
    claimed: Tensor
    matched_weight: float
    """w: the share of the teacher's ids that have a match."""

    def build_tables(self, pair: TokenizerPair) -> None:
        partner = as_buffer(pair.exact())
        self.register_buffer("partner", partner, persistent=False)
        self.register_buffer("claimed", claimed_by(partner, pair.vocab_s), persistent=False)
        self.matched_weight = float((partner >= 0).double().mean())

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[Candidates]:
        assert student.token_rows is not None
        assert student.token_ids is not None
        chosen = candidates_of(student, signal, partner=self.partner, claimed=self.claimed, k=self.top_k)
        first = LogprobRequest.at_groups(student, chosen.ids_s.clamp(min=0), chosen)
        return LogprobRequest(
            torch.cat((first.rows, student.token_rows)), torch.cat((first.ids, student.token_ids)), chosen
        )

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[Candidates], signal: TeacherSignal
    ) -> KDSums:
        assert signal.token_logprobs is not None
        assert signal.token_group is not None
        assert request.state.token_group is not None
        chosen, groups, width = request.state, len(signal.top.ids), signal.top.ids.shape[1]
        later_t = _later(signal.token_logprobs, signal.token_group, groups)
        teacher, teacher_ranked = self._log_p(chosen.teacher, later_t, width, complete=chosen.whole_t)
        first, tokens = logprobs.split((chosen.ids_s.numel(), len(request.state.token_group)))
        outcomes = TopK(chosen.ids_s, first.view(chosen.ids_s.shape))
        later_s = _later(tokens, request.state.token_group, groups)
        student, student_ranked = self._log_p(outcomes, later_s, width, complete=chosen.whole_s)
        direct = generalised_jsd(teacher, student, self.settings.beta)
        by_rank = sorted_l1(teacher_ranked.exp(), student_ranked.exp())
        divergence = self.matched_weight * direct + (1 - self.matched_weight) * by_rank
        return kd_sums(divergence, signal.top.logprobs, chosen.has_partner)

    def _log_p(
        self, outcomes: TopK, later: Float[Tensor, " group"], width: int, *, complete: bool
    ) -> tuple[Tensor, Tensor]:
        """Give log P of the matched outcomes, and of those that go by rank."""
        first = tempered(
            outcomes.logprobs, outcomes.ids >= 0, temperature=self.settings.temperature, complete=complete
        )
        every = first + later.clamp(min=NOTHING).unsqueeze(-1)
        return every.narrow(1, 0, width), every.narrow(1, width, every.shape[1] - width)


def candidates_of(
    student: StudentLogits,
    signal: TeacherSignal,
    *,
    partner: Int64[Tensor, " vocab_t"],
    claimed: Bool[Tensor, " vocab_s"],
    k: int,
) -> Candidates:
    """Part the top k of both models by `partner`; `claimed` marks the student ids that are one."""
    top = top_k(student.logits, k, real=student.vocab, rows=student.rows, lse=student.lse)
    is_claimed = claimed.index_select(0, top.ids.flatten()).view_as(top.ids)
    partners = partners_of(signal.top, partner)
    matched = merged(signal.top, partners)
    others = moved_to_front(signal.top, (partners < 0) & (signal.top.logprobs > -torch.inf))
    whole_t = partners.shape[1] == len(partner)
    return Candidates(
        teacher=TopK(
            torch.cat((matched.ids, others.ids), dim=-1),
            torch.cat((matched.logprobs, others.logprobs), dim=-1),
        ),
        ids_s=torch.cat((matched.ids, moved_to_front(top, is_claimed.logical_not()).ids), dim=-1),
        has_partner=partners >= 0,
        whole_t=whole_t,
        whole_s=whole_t and top.ids.shape[1] == student.vocab,
        token_group=student.token_group,
    )


def claimed_by(partner: Int64[Tensor, " vocab_t"], vocab_s: int) -> Bool[Tensor, " vocab_s"]:
    """Mark the student ids that are a partner."""
    claimed = torch.zeros(vocab_s + 1, dtype=torch.bool)
    return claimed.index_fill(0, torch.where(partner >= 0, partner, vocab_s), True).narrow(0, 0, vocab_s)


def moved_to_front(top: TopK, mask: Bool[Tensor, "group topk"]) -> TopK:
    """Move the candidates in `mask` to the front, in their order; −1 fills up."""
    order = mask.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    ids = torch.where(mask, top.ids, NO_MATCH)
    return TopK(ids.gather(-1, order), top.logprobs.gather(-1, order))


def _later(
    logprobs: Float[Tensor, " token"], group: Int64[Tensor, " token"], groups: int
) -> Float[Tensor, " group"]:
    """Sum the log-probabilities of the tokens after the first of each group."""
    later = group.diff(prepend=group.new_full((1,), -1)) == 0
    return group_sums(torch.where(later, logprobs, 0.0), group, groups)
