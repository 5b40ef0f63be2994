"""GOLD: ids with the same bytes are compared directly, the others by rank, on groups of whole tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cdm_toolkit.distill.losses.buckets import NOTHING, generalised_jsd, tempered
from cdm_toolkit.distill.losses.pick import top_k
from cdm_toolkit.distill.losses.reading import group_sums, kd_parts, read_groups
from cdm_toolkit.distill.losses.record import KdParts, Reading, StudentSees, TeacherSays, TopK
from cdm_toolkit.distill.losses.static_map import merged, partners_of
from cdm_toolkit.distill.losses.uld import sorted_l1
from cdm_toolkit.vocab_map.types import NO_MATCH

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GoldSettings:
    """What GOLD needs beside the logits; `gold_settings` fills it in."""

    exact: Int64[Tensor, " vocab_t"]
    """The student id with the same bytes or role, −1 without one."""
    claimed: Bool[Tensor, " vocab_s"]
    """Which student ids have such a teacher id."""
    top_k: int
    """Of the student; the teacher's is what it says."""
    matched_weight: float
    unmatched_weight: float
    temperature: float = 1.0
    beta: float = 0.5


def gold_settings(
    exact: Int64[Tensor, " vocab_t"], *, vocab_s: int, top_k: int, temperature: float, beta: float
) -> GoldSettings:
    """Weigh the matched ids by their share of the teacher's vocabulary, the others by what it leaves."""
    claimed = torch.zeros(vocab_s + 1, dtype=torch.bool, device=exact.device)
    claimed = claimed.index_fill(0, torch.where(exact >= 0, exact, vocab_s), True).narrow(0, 0, vocab_s)
    matched = float((exact >= 0).double().mean())
    return GoldSettings(exact, claimed, top_k, matched, 1 - matched, temperature, beta)


def gold(sees: StudentSees, says: TeacherSays, settings: GoldSettings) -> Reading:
    """Give w JSD_β(P, Q) over matched ids + v Σ |P_(i) - Q_(i)| over the ranks of the unmatched ones.

    P(y) of a group of tokens x₁ … xₙ is p(y | before) · p(x₂ | x₁) · … · p(xₙ | … xₙ₋₁): the distribution of
    the first token, times the probabilities of the other tokens that really follow. It does not sum to 1. Q is
    the student's, of its own tokens (TRL's GOLD trainer, `ULDLoss` with `uld_use_hybrid_loss`). Ids match by
    bytes or role; w is their share of the teacher's vocabulary and v = 1 - w. The differences to TRL's:

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
    assert says.token_logprobs is not None
    assert says.token_group is not None
    assert sees.token_rows is not None
    assert sees.token_ids is not None
    chosen = _choose(sees, says, settings)
    width, groups, token_group = says.top.ids.shape[1], len(says.top.ids), sees.token_group

    def log_p(outcomes: TopK, later: Tensor, *, complete: bool) -> tuple[Tensor, Tensor]:
        """Give log P of the matched outcomes, and of those that go by rank."""
        first = tempered(
            outcomes.logprobs, outcomes.ids >= 0, temperature=settings.temperature, complete=complete
        )
        every = first + later.clamp(min=NOTHING).unsqueeze(-1)
        return every.narrow(1, 0, width), every.narrow(1, width, every.shape[1] - width)

    later = _later(says.token_logprobs, says.token_group, groups)
    teacher, teacher_ranked = log_p(chosen.teacher, later, complete=chosen.whole_t)

    def divergence(picked: Tensor) -> KdParts:
        first, tokens = picked.split((chosen.ids_s.numel(), len(token_group)))
        outcomes = TopK(chosen.ids_s, first.view(chosen.ids_s.shape))
        later = _later(tokens, token_group, groups)
        student, student_ranked = log_p(outcomes, later, complete=chosen.whole_s)
        direct = generalised_jsd(teacher, student, settings.beta)
        by_rank = sorted_l1(teacher_ranked.exp(), student_ranked.exp())
        between = settings.matched_weight * direct + settings.unmatched_weight * by_rank
        return kd_parts(between, says.top.logprobs, chosen.has_partner)

    of_groups = read_groups(sees, chosen.ids_s.clamp(min=0), divergence)
    return Reading(
        torch.cat((of_groups.rows, sees.token_rows)), torch.cat((of_groups.ids, sees.token_ids)), divergence
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """Outcomes of each group: first the matched, as many as the teacher's k, then those that go by rank."""

    teacher: TopK
    ids_s: Int64[Tensor, "group outcome_s"]
    """Those of the student; −1 fills up on both sides."""
    has_partner: Bool[Tensor, "group topk_t"]
    """Of the teacher's candidates."""
    whole_t: bool
    """Nothing of the vocabulary is left out."""
    whole_s: bool


def _choose(sees: StudentSees, says: TeacherSays, settings: GoldSettings) -> _Chosen:
    top = top_k(sees.logits, min(settings.top_k, sees.vocab), real=sees.vocab, rows=sees.rows, lse=sees.lse)
    claimed = settings.claimed.index_select(0, top.ids.flatten()).view_as(top.ids)
    partners = partners_of(says.top, settings.exact)
    matched = merged(says.top, partners)
    others = _only(says.top, (partners < 0) & (says.top.logprobs > -torch.inf))
    whole_t = partners.shape[1] == len(settings.exact)
    return _Chosen(
        teacher=TopK(
            torch.cat((matched.ids, others.ids), dim=-1),
            torch.cat((matched.logprobs, others.logprobs), dim=-1),
        ),
        ids_s=torch.cat((matched.ids, _only(top, claimed.logical_not()).ids), dim=-1),
        has_partner=partners >= 0,
        whole_t=whole_t,
        whole_s=whole_t and top.ids.shape[1] == sees.vocab,
    )


def _only(top: TopK, mask: Bool[Tensor, "group topk"]) -> TopK:
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
