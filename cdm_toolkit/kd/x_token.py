"""X-Token (arXiv 2605.21699): the student's distribution, projected on the teacher's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cdm_toolkit.kd.divergences import NOTHING, kd_sums, kl, outcomes, tempered
from cdm_toolkit.kd.gold import Candidates, candidates_of, claimed_by
from cdm_toolkit.kd.method import Method, as_buffer
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.projection_file import read_projection
from cdm_toolkit.kd.settings import (
    MethodSettings,
    Positions,
    positions_setting,
    rest_bucket_setting,
    setting,
    temperature_setting,
    top_k_setting,
)
from cdm_toolkit.kd.sparse_logprobs import top_k
from cdm_toolkit.kd.spelling import FAR, find_outcomes
from cdm_toolkit.kd.types import KDSums, LogprobRequest, StudentLogits, TeacherSignal, TopK
from cdm_toolkit.kd.uld import sorted_l1
from cdm_toolkit.vocab_map.projection import WIDTH, Projection, heaviest_rows, one_to_one
from cdm_toolkit.vocab_map.types import NO_MATCH

EPS = 1e-10
"""Added to the student's projected probabilities, as in the published code: a teacher id that no student id stands
for has this one."""
COMMON = 0.6
"""Weight in W from which H-KL pairs a student id with a teacher id."""
PREIMAGES = 4
"""Student ids that are read for each teacher candidate, however unlikely: those with the largest weights."""
LEAST = 1e-6
"""Lower bound of the student's rest probability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XTokenSettings(MethodSettings):
    """Settings of `XToken`."""

    formulation: Literal["p-kl", "h-kl"] = setting(
        "p-kl",
        "p-kl: KL over the teacher's ids, the student projected on them; h-kl: KL over pairs of ids, L1 by rank over "
        "the others.",
    )
    temperature: float = temperature_setting()
    top_k: int | None = top_k_setting()
    batch_top_k: int | None = setting(
        None,
        "Teacher ids that p-kl compares in a batch, the likeliest anywhere in it (NeMo-RL: 8192); unset, all.",
        at_least=1,
    )
    uncommon_top_k: int = setting(8192, "Ranks of unpaired ids that h-kl compares.", at_least=1)
    rest_bucket: bool = rest_bucket_setting()
    reverse_kl: bool = setting(False, "Take KL(student ‖ teacher) in place of KL(teacher ‖ student).")
    positions: Positions = positions_setting()
    projection: str | None = setting(
        None, "A `.pt` with the projection W, as NeMo-RL's tools write it; unset, W is built by rule."
    )
    projection_width: int = setting(
        WIDTH, "Teacher ids that a student id stands for in a W built by rule.", at_least=1
    )


@dataclass(frozen=True, slots=True, eq=False)
class Projected:
    """Teacher ids that p-kl compares at each group, and where the student's probabilities go.

    `slots` and `weights` say of each student id that is read, `width` times, which outcome it counts for and how
    much; 0 for an id that comes again, or for none. `rest` says that all other probability is one more outcome.
    """

    teacher: TopK
    slots: Int64[Tensor, "group entry"]
    weights: Float[Tensor, "group pick width"]
    has_partner: Bool[Tensor, "group topk"]
    rest: bool


class XToken(Method[XTokenSettings, Projected | Candidates]):
    """P-KL, T² KL(p ‖ Wᵀq), or H-KL, T² (Σ p log(p / q) over pairs + Σ |p_(i) − q_(i)| over the ranks of the others).

    W [student id, teacher id] is sparse and its rows sum to 1: a student id stands for the teacher id with the
    same bytes, or for the teacher tokens that spell it (`vocab_map.projection`), or for what the file `projection`
    says. P-KL renormalises p and Wᵀq over the teacher's candidates, and adds 1e-10 to the student's. H-KL
    pairs each student id with the teacher id that has at least 0.6 of its weight, one to one; its sum over pairs
    is over parts of two distributions, and so may be below 0. Sources: arXiv 2605.21699 and
    `CrossTokenizerDistillationLossFn` of NeMo-RL, whose value it has where groups are 1-1 and the top k are all
    ids. The differences:

    - p covers the teacher's k candidates at each position; the publication's covers the 8,192 likeliest ids of the
      batch. `batch_top_k` keeps of the candidates the likeliest of the batch, by log-probabilities at the groups (there
      by logits at all positions). All other ids are one more outcome of P-KL (`rest_bucket`): without it the
      student could put probability there at no cost. The publication has no such outcome.
    - Of the student its k likeliest ids are read, and for each teacher candidate the PREIMAGES ids with the largest
      weights in W. The others count as rest, without a gradient of their own; in H-KL they are in no sum, as in `gold`.
    - A temperature other than 1 takes what is left out as one outcome.
    - Logits are those at the boundary before each group, or the mean over it (`positions`). The publication averages
      the student's projected probabilities and the teacher's log-probabilities over a group's tokens, which
      is the same for groups of one token each.
    - Groups are exact, so that there are none whose texts differ (`exact_token_match_only`).
    - Of the rules for W, the pass from the teacher's tokens to the student's and the weight of 0.2 for the last id of
      a row ("scale trick") are left out: both depend on how ties are broken. Special tokens are paired by
      role, not by likeness of their names. A W read from a file has whatever it was built with.
    - How CE and KD are weighed (`dynamic_loss_scaling`) is the objective's, not the method's.

    `matched_mass` and `pairs` are those of teacher candidates that some student id stands for (P-KL) or that are in
    a pair (H-KL). A teacher id without any student id adds up to p log(1e10) to P-KL, and no gradient.
    """

    name = "x-token"
    summary = "KL over the teacher's ids, the student's distribution projected on them by a sparse matrix"
    source = "arXiv 2605.21699"
    Settings = XTokenSettings
    color, marker = "#7a5200", "d"
    needs_match = True

    teacher_ids: Tensor
    """int64 [vocab_s, width]: W's teacher ids of each student id, −1 for none."""
    weights: Tensor
    """float32 [vocab_s, width]: their weights."""
    preimages: Tensor
    """int64 [vocab_t, PREIMAGES]: student ids that stand for each teacher id, −1 for none."""
    partner: Tensor
    """int64 [vocab_t]: the student id that is paired with each teacher id, −1 for none."""
    claimed: Tensor
    """bool [vocab_s]: the student ids that are paired."""
    ranks: int
    """Ranks of unpaired ids that both vocabularies have, and that count."""

    def build_tables(self, pair: TokenizerPair) -> None:
        path = self.settings.projection
        found = (
            pair.projection(self.settings.projection_width) if path is None else read_projection(path, pair)
        )
        if self.settings.formulation == "p-kl":
            self._build_projection(found, pair)
        else:
            self._build_pairs(found, pair)

    def _build_projection(self, projection: Projection, pair: TokenizerPair) -> None:
        self.register_buffer("teacher_ids", as_buffer(projection.ids), persistent=False)
        self.register_buffer("weights", torch.from_numpy(projection.weights), persistent=False)
        preimages = as_buffer(heaviest_rows(projection, pair.vocab_t, PREIMAGES))
        self.register_buffer("preimages", preimages, persistent=False)

    def _build_pairs(self, projection: Projection, pair: TokenizerPair) -> None:
        partner = as_buffer(one_to_one(projection, pair.vocab_t, at_least=COMMON))
        self.register_buffer("partner", partner, persistent=False)
        self.register_buffer("claimed", claimed_by(partner, pair.vocab_s), persistent=False)
        paired = int((partner >= 0).sum())
        self.ranks = min(min(pair.vocab_t, pair.vocab_s) - paired, self.settings.uncommon_top_k)

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[Projected | Candidates]:
        if self.settings.formulation == "h-kl":
            parted = candidates_of(student, signal, partner=self.partner, claimed=self.claimed, k=self.top_k)
            return LogprobRequest.at_groups(student, parted.ids_s.clamp(min=0), parted)
        top = top_k(student.logits, self.top_k, real=student.vocab, rows=student.rows, lse=student.lse)
        preimages = self.preimages.index_select(0, signal.top.ids.flatten())
        preimages = preimages.view(len(top.ids), signal.top.ids.shape[1] * PREIMAGES)
        ids = _distinct(torch.cat((top.ids, preimages), dim=-1))
        return LogprobRequest.at_groups(student, ids.clamp(min=0), self._projected(ids, signal.top))

    def _projected(self, ids: Int64[Tensor, "group pick"], candidates: TopK) -> Projected:
        """Find the outcomes that the entries of W belong to, for student ids of which −1 is none."""
        kept = self._kept(candidates)
        columns = torch.where(kept, candidates.ids, FAR).sort(-1)
        rows = ids.clamp(min=0).flatten()
        of = self.teacher_ids.index_select(0, rows).view(*ids.shape, self.teacher_ids.shape[1])
        there, slots = find_outcomes(of.flatten(1), *columns)
        counts = there.view_as(of) & (ids >= 0).unsqueeze(-1)
        reached = self.preimages.select(1, 0).index_select(0, candidates.ids.flatten()) >= 0
        return Projected(
            teacher=TopK(torch.where(kept, candidates.ids, NO_MATCH), candidates.logprobs.clamp(min=NOTHING)),
            slots=slots,
            weights=self.weights.index_select(0, rows).view_as(of).masked_fill(counts.logical_not(), 0),
            has_partner=kept & reached.view_as(kept) & (candidates.logprobs > -torch.inf),
            rest=self.settings.rest_bucket and not self._complete(candidates),
        )

    def _kept(self, candidates: TopK) -> Bool[Tensor, "group topk"]:
        """Mark the candidates that are among the likeliest of the batch."""
        most, vocab_t = self.settings.batch_top_k, len(self.preimages)
        if most is None or most >= vocab_t:
            return torch.ones_like(candidates.ids, dtype=torch.bool)
        importance = candidates.logprobs.new_full((vocab_t,), -torch.inf).scatter_reduce(
            0, candidates.ids.flatten(), candidates.logprobs.flatten(), "amax"
        )
        among = torch.zeros_like(importance, dtype=torch.bool).index_fill(
            0, importance.topk(most).indices, True
        )
        return among.index_select(0, candidates.ids.flatten()).view_as(candidates.ids)

    def _complete(self, candidates: TopK) -> bool:
        """Say whether the outcomes are the teacher's whole vocabulary."""
        most, vocab_t = self.settings.batch_top_k, len(self.preimages)
        return candidates.ids.shape[1] == vocab_t and (most is None or most >= vocab_t)

    def loss(
        self,
        logprobs: Float[Tensor, " pick"],
        request: LogprobRequest[Projected | Candidates],
        signal: TeacherSignal,
    ) -> KDSums:
        chosen = request.state
        divergence = (
            self._p_kl(logprobs, chosen) if isinstance(chosen, Projected) else self._h_kl(logprobs, chosen)
        )
        return kd_sums(self.settings.temperature**2 * divergence, signal.top.logprobs, chosen.has_partner)

    def _p_kl(self, logprobs: Float[Tensor, " pick"], chosen: Projected) -> Float[Tensor, " group"]:
        kept = chosen.teacher.ids >= 0
        teacher = outcomes(
            chosen.teacher.logprobs, kept, temperature=self.settings.temperature, rest_bucket=chosen.rest
        )
        student = self._project(logprobs.view(chosen.weights.shape[:2]), chosen)
        kept = torch.nn.functional.pad(kept, (0, teacher.shape[1] - kept.shape[1]), value=True)
        p, q = (student, teacher) if self.settings.reverse_kl else (teacher, student)
        return torch.where(kept, p.exp() * (p - q), 0.0).sum(-1)

    def _project(
        self, logprobs: Float[Tensor, "group pick"], chosen: Projected
    ) -> Float[Tensor, "group outcome"]:
        """Give the logarithms of the student's projected probabilities of the outcomes.

        The rest is taken before the temperature is applied, as in `divergences.outcomes`.
        """
        temperature = self.settings.temperature
        weights = chosen.weights.to(logprobs.dtype)
        entries = (logprobs / temperature).exp().unsqueeze(-1) * weights
        mass = torch.zeros_like(chosen.teacher.logprobs, dtype=entries.dtype)
        mass = mass.scatter_add(-1, chosen.slots, entries.flatten(1))
        if chosen.rest:
            read = (logprobs.exp().unsqueeze(-1) * weights).sum((-2, -1))
            rest = (1 - read).clamp(min=LEAST) ** (1 / temperature)
            mass = torch.cat((mass, rest.unsqueeze(-1)), dim=-1)
        return (mass / (mass.sum(-1, keepdim=True) + EPS) + EPS).log()

    def _h_kl(self, logprobs: Float[Tensor, " pick"], chosen: Candidates) -> Float[Tensor, " group"]:
        width = chosen.has_partner.shape[1]
        sides = (
            self._parted(chosen.teacher.logprobs, chosen.teacher.ids, width, complete=chosen.whole_t),
            self._parted(logprobs.view_as(chosen.ids_s), chosen.ids_s, width, complete=chosen.whole_s),
        )
        (paired_t, ranked_t), (paired_s, ranked_s) = sides
        direct = kl(paired_s, paired_t) if self.settings.reverse_kl else kl(paired_t, paired_s)
        return direct + sorted_l1(ranked_t, ranked_s)

    def _parted(
        self, logprobs: Tensor, ids: Int64[Tensor, "group outcome"], width: int, *, complete: bool
    ) -> tuple[Tensor, Tensor]:
        """Give log-probabilities of the paired outcomes, and probabilities of those that go by rank."""
        every = tempered(logprobs, ids >= 0, temperature=self.settings.temperature, complete=complete)
        ranks = min(every.shape[1] - width, self.ranks)
        return every.narrow(1, 0, width), every.narrow(1, width, ranks).exp()


def _distinct(ids: Int64[Tensor, "group pick"]) -> Int64[Tensor, "group pick"]:
    """Sort the ids of each group, and make −1 of those that come again."""
    in_order = ids.sort(-1).values
    again = in_order.diff(dim=-1, prepend=in_order.new_full((len(ids), 1), NO_MATCH)) == 0
    return in_order.masked_fill(again, NO_MATCH)
