"""Mapping by spelling: each teacher candidate stands for the student token that its bytes continue with.

At a shared boundary the teacher's candidates stand for the student tokens that their spellings begin with. Where the
teacher writes a student token in several, and the text begins so, what it predicts at the later of these says how
likely that student token and its likes are. At a student token inside a group, the part of the group before it is
known, and only the candidates whose spelling begins with it are left: what they spell next is the teacher's
distribution there. By the chain rule these are, in expectation over the teacher's text, the divergence over whole
teacher tokens, seen through the student's spelling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cdm_toolkit.kd.divergences import NOTHING, bucket_divergence, first_and_count, kd_sums
from cdm_toolkit.kd.joint import joint_outcomes
from cdm_toolkit.kd.method import Method, as_buffer
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.settings import (
    Divergence,
    MethodSettings,
    beta_setting,
    divergence_setting,
    rest_bucket_setting,
    setting,
    temperature_setting,
    top_k_setting,
)
from cdm_toolkit.kd.sparse_logprobs import top_k
from cdm_toolkit.kd.static_map import merged
from cdm_toolkit.kd.types import (
    Comparison,
    KDSums,
    LogprobRequest,
    SignalRequest,
    StudentLogits,
    TeacherSignal,
    TopK,
)
from cdm_toolkit.vocab_map.spelling_trie import build_spelling_trie
from cdm_toolkit.vocab_map.types import NO_MATCH

STUDENT_CANDIDATES = 32
"""Student candidates among which longer tokens are looked for: what is less likely adds next to nothing."""
OUTCOMES = 128
"""Most student tokens that are compared at a position; many candidates share one."""
FAR = 1 << 40
"""Sorts behind every id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpellingSettings(MethodSettings):
    """Settings of `Spelling`."""

    temperature: float = temperature_setting()
    top_k: int | None = top_k_setting()
    rest_bucket: bool = rest_bucket_setting()
    divergence: Divergence = divergence_setting()
    beta: float = beta_setting()
    both_directions: bool = setting(
        True, "Count a student candidate that spells several teacher tokens for the one it begins with."
    )
    intra_group: bool = setting(
        True, "Teach the student's tokens inside a group too, not only at shared boundaries."
    )
    joint: bool = setting(
        True,
        "Give a student token that the teacher writes in several the probability of all of them, along the text.",
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Positions:
    """Where the student is read: a flat list; the first of each group comes first, in the order of groups."""

    rows: Int64[Tensor, " position"]
    group: Int64[Tensor, " position"]
    before: Int64[Tensor, " position"]
    """Tokens of the group that stand before the position."""


@dataclass(frozen=True, slots=True, eq=False)
class SpelledOutcomes:
    """What is compared: student tokens with the teacher's probability of each, at each position."""

    teacher: TopK
    longer: _Longer | None
    has_partner: Bool[Tensor, "group topk"]
    """Of the teacher's candidates."""
    weight: Float[Tensor, " position"]
    """Of its divergence: 1 at boundaries, inside a group the share of the probability that the candidates know of."""


class Spelling(Method[SpellingSettings, SpelledOutcomes]):
    """T² KL(teacher ‖ student) over the student tokens that come next in the teacher's spelled candidates.

    Candidates whose spellings go on with one token are one outcome. Both distributions are renormalised over
    the outcomes at temperature T, with all other probability as one more where `rest_bucket` is set. At a
    boundary a student token that the teacher writes in several, such as `48` for `4` and `8`, is an outcome with
    the probability of all of them, where the text goes on with all of these but the last; any other of the
    student's likeliest that is no outcome counts for the one that its own spelling begins with. The divergences of
    a group's positions are summed up. Positions inside a group count only where the group is one teacher token
    that is a candidate, and then by what the candidates know of: of an unexpected word they say little about how
    it continues. The outcomes are the OUTCOMES with the most of the teacher's probability; smaller ones are a part
    of the rest on both sides.

    A mapping of this toolkit's own, in place of the pairs of arXiv 2502.11104, section 3.3.
    """

    name = "spelling"
    summary = "KL over the next student tokens in the spellings of the teacher's candidates, at each position"
    source = "this toolkit"
    Settings = SpellingSettings
    color, marker = "#0072b2", "o"
    needs_match = True
    reads_student_tokens = True

    spelling: Tensor
    """int64 [vocab_t, longest]: student tokens that each teacher id is spelled by, −1 behind its end."""
    beginning: Tensor
    """int64 [vocab_s]: the student id that stands for the first teacher token of each student id's spelling, −1
    without one."""
    trie_keys: Tensor
    trie_ends: Tensor
    longest_prefix: Tensor
    """Those of the `SpellingTrie` of the student's ids."""

    def build_tables(self, pair: TokenizerPair) -> None:
        spellings = pair.spellings()
        of_t, of_s = as_buffer(spellings.of_t), as_buffer(spellings.of_s)
        beginning = torch.where(of_s[:, 0] >= 0, of_t[of_s[:, 0].clamp(min=0), 0], NO_MATCH)
        self.register_buffer("spelling", of_t, persistent=False)
        self.register_buffer("beginning", beginning, persistent=False)
        trie = build_spelling_trie(spellings.of_s, pair.vocab_t)
        self.register_buffer("trie_keys", as_buffer(trie.keys), persistent=False)
        self.register_buffer("trie_ends", as_buffer(trie.ends), persistent=False)
        self.register_buffer("longest_prefix", as_buffer(trie.longest_prefix), persistent=False)

    @property
    def signal_request(self) -> SignalRequest:
        """Ask for the candidates at every teacher token where joint probabilities are wanted."""
        joint = self.settings.joint
        return SignalRequest(self.top_k, token_logprobs=joint, token_top=joint)

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[SpelledOutcomes]:
        groups = len(signal.top.ids)
        positions = _positions(student, groups, self.settings.intra_group)
        partners, logprobs, weight = _next_tokens(student, signal.top, positions, self.spelling)
        if self.settings.joint:
            partners, logprobs = self._with_joint(partners, logprobs, student, signal)
        teacher = largest_outcomes(merged(TopK(partners, logprobs), partners))
        width = teacher.ids.shape[1]
        rows, ids = positions.rows.repeat_interleave(width), teacher.ids.clamp(min=0).flatten()
        longer = None
        if self.settings.both_directions:
            k = min(self.top_k, STUDENT_CANDIDATES)
            top = top_k(student.logits, k, real=student.vocab, rows=student.rows, lse=student.lse).ids
            longer = _longer(top, teacher.ids.narrow(0, 0, groups), self.longest_prefix, self.beginning)
            rows = torch.cat((rows, student.rows.repeat_interleave(longer.ids.shape[1])))
            ids = torch.cat((ids, longer.ids.flatten()))
        has_partner = partners.narrow(0, 0, groups).narrow(1, 0, signal.top.ids.shape[1]) >= 0
        return LogprobRequest(rows, ids, SpelledOutcomes(teacher, longer, has_partner, weight))

    def _with_joint(
        self,
        partners: Int64[Tensor, "position candidate"],
        logprobs: Float[Tensor, "position candidate"],
        student: StudentLogits,
        signal: TeacherSignal,
    ) -> tuple[Int64[Tensor, "position outcome"], Float[Tensor, "position outcome"]]:
        """Add, at boundaries, the student tokens that the teacher writes in several, and the text's own token.

        What these have comes off the candidate that they begin with.
        """
        assert student.follows is not None
        groups = len(signal.top.ids)
        joint = joint_outcomes(signal, student.follows, self.trie_keys, self.trie_ends, self.pair.vocab_t)
        tiny = torch.finfo(logprobs.dtype).tiny
        left = (joint.first_logprob.exp() - joint.taken).clamp(min=tiny).log()
        boundary, inside = logprobs.split([groups, len(logprobs) - groups])
        boundary = boundary.masked_fill(signal.top.ids == joint.first.unsqueeze(-1), -torch.inf)
        ids = torch.cat(
            (self.spelling.select(1, 0).index_select(0, joint.first).unsqueeze(-1), joint.ids), -1
        )
        added = torch.cat((left.unsqueeze(-1), joint.masses.clamp(min=tiny).log()), -1)
        ids = torch.cat((ids, ids.new_full((len(inside), ids.shape[1]), NO_MATCH)))
        added = torch.cat((added, added.new_full((len(inside), added.shape[1]), -torch.inf)))
        return torch.cat((partners, ids), -1), torch.cat((torch.cat((boundary, inside)), added), -1)

    def compare(
        self,
        logprobs: Float[Tensor, " pick"],
        request: LogprobRequest[SpelledOutcomes],
        signal: TeacherSignal,
    ) -> Comparison:
        teacher, longer, groups = request.state.teacher, request.state.longer, len(signal.top.ids)
        own = logprobs.narrow(0, 0, teacher.ids.numel()).view_as(teacher.logprobs)
        if longer is not None:
            more = logprobs.narrow(0, teacher.ids.numel(), longer.ids.numel()).view(longer.ids.shape)
            at_boundary, inside = own.split([groups, len(own) - groups])
            own = torch.cat((longer.added_to(at_boundary, more), inside))
        divergence = bucket_divergence(
            teacher.logprobs,
            own,
            teacher.ids >= 0,
            temperature=self.settings.temperature,
            rest_bucket=self.settings.rest_bucket,
            divergence=self.settings.divergence,
            beta=self.settings.beta,
        )
        rows = request.rows.narrow(0, 0, teacher.ids.numel()).view_as(teacher.ids).select(1, 0)
        return Comparison(rows, teacher.ids, teacher.logprobs, own, request.state.weight * divergence)

    def loss(
        self,
        logprobs: Float[Tensor, " pick"],
        request: LogprobRequest[SpelledOutcomes],
        signal: TeacherSignal,
    ) -> KDSums:
        compared = self.compare(logprobs, request, signal)
        return kd_sums(compared.divergence, signal.top.logprobs, request.state.has_partner)


def _positions(student: StudentLogits, groups: int, intra_group: bool) -> _Positions:
    every = torch.arange(groups, device=student.rows.device)
    if not intra_group:
        return _Positions(student.rows, every, torch.zeros_like(every))
    assert student.token_rows is not None
    assert student.token_group is not None
    first, _ = first_and_count(student.token_group, groups)
    before = torch.arange(len(student.token_group), device=every.device) - first.index_select(
        0, student.token_group
    )
    order = before.gt(0).to(torch.int64).sort(stable=True).indices  # without asking how many are inside
    return _Positions(
        *(each.index_select(0, order) for each in (student.token_rows, student.token_group, before))
    )


def _next_tokens(
    student: StudentLogits,
    candidates: TopK,
    positions: _Positions,
    spelling: Int64[Tensor, "vocab_t longest"],
) -> tuple[
    Int64[Tensor, "position candidate"], Float[Tensor, "position candidate"], Float[Tensor, " position"]
]:
    """Give the student token that each candidate goes on with, −1 where it does not, and its log-probability.

    Inside a group that is the probability given what of the group is spelled already. The candidates know nothing
    of what follows one that ends there, nor of tokens that are none of them: the third is the share of the
    probability that they know of.
    """
    groups, longest = len(candidates.ids), spelling.shape[1]
    possible = candidates.logprobs > -torch.inf
    first = spelling.select(1, 0).index_select(0, candidates.ids.flatten()).view_as(candidates.ids)
    at_boundary = torch.where(possible, first, NO_MATCH)

    group = positions.group.narrow(0, groups, len(positions.group) - groups)
    before = positions.before.narrow(0, groups, len(group))
    ids, left = candidates.ids.index_select(0, group), possible.index_select(0, group)
    ways = spelling.index_select(0, ids.flatten()).view(*ids.shape, longest)
    text = _text(student, groups, longest)
    # a spelling of `longest` tokens may have been cut: whether it is the text cannot be told
    is_text = left & (text[-1] == NO_MATCH).index_select(0, group).unsqueeze(-1)
    for nth, token in enumerate(text):
        same = ways.select(-1, nth) == token.index_select(0, group).unsqueeze(-1)
        left, is_text = left & (same | (before <= nth).unsqueeze(-1)), is_text & same
    left = left & is_text.any(-1, keepdim=True)
    at = before.clamp(max=longest - 1).view(-1, 1, 1).expand(-1, ids.shape[1], 1)
    inside = torch.where(left, ways.gather(-1, at).squeeze(-1), NO_MATCH)
    every = candidates.logprobs.index_select(0, group)
    weight = torch.cat((every.new_ones(groups), _known_share(every.exp(), left, inside >= 0)))
    given = _given(every, inside >= 0)
    return torch.cat((at_boundary, inside)), torch.cat((candidates.logprobs, given)), weight


def _text(student: StudentLogits, groups: int, most: int) -> list[Int64[Tensor, " group"]]:
    """List the first token of each group, the second, ...; −1 behind a group's end."""
    assert student.token_ids is not None
    assert student.token_group is not None
    first, count = first_and_count(student.token_group, groups)
    last = len(student.token_ids) - 1
    return [
        torch.where(nth < count, student.token_ids.index_select(0, (first + nth).clamp(max=last)), NO_MATCH)
        for nth in range(most)
    ]


def _known_share(
    masses: Float[Tensor, "position candidate"],
    left: Bool[Tensor, "position candidate"],
    goes_on: Bool[Tensor, "position candidate"],
) -> Float[Tensor, " position"]:
    """Give the share of the candidates that go on among these, those that end there, and all that are none."""
    further = torch.where(goes_on, masses, 0.0).sum(-1)
    every = torch.where(left, masses, 0.0).sum(-1) + (1 - masses.sum(-1)).clamp(min=0)
    return further / every.clamp(min=torch.finfo(masses.dtype).tiny)


def _given(
    logprobs: Float[Tensor, "position candidate"], mask: Bool[Tensor, "position candidate"]
) -> Float[Tensor, "position candidate"]:
    """Renormalise over the candidates in `mask`, where there are any."""
    total = logprobs.masked_fill(mask.logical_not(), NOTHING).logsumexp(-1, keepdim=True)
    return logprobs - torch.where(mask.any(-1, keepdim=True), total, 0.0)


def largest_outcomes(outcomes: TopK) -> TopK:
    """Keep the OUTCOMES with the most probability."""
    if outcomes.ids.shape[1] <= OUTCOMES:
        return outcomes
    masses = outcomes.logprobs.masked_fill(outcomes.ids < 0, -torch.inf)
    kept = masses.topk(OUTCOMES, dim=-1).indices
    return TopK(outcomes.ids.gather(-1, kept), outcomes.logprobs.gather(-1, kept))


@dataclass(frozen=True, slots=True, eq=False)
class _Longer:
    """Student candidates that are no outcome at a boundary: `slots` says for which outcome each counts."""

    ids: Int64[Tensor, "group topk"]
    slots: Int64[Tensor, "group topk"]
    mask: Bool[Tensor, "group topk"]

    def added_to(
        self, own: Float[Tensor, "group outcome"], more: Float[Tensor, "group topk"]
    ) -> Float[Tensor, "group outcome"]:
        """Add the probabilities of these candidates to those of the outcomes; all in logarithms."""
        added = torch.zeros_like(own).scatter_add(-1, self.slots, torch.where(self.mask, more.exp(), 0.0))
        tiny = torch.finfo(added.dtype).tiny
        return torch.where(added > tiny, torch.logaddexp(own, added.clamp(min=tiny).log()), own)


def _longer(
    ids: Int64[Tensor, "group topk"],
    outcomes: Int64[Tensor, "group outcome"],
    longest_prefix: Int64[Tensor, " vocab_s"],
    beginning: Int64[Tensor, " vocab_s"],
) -> _Longer:
    in_order = torch.where(outcomes >= 0, outcomes, FAR).sort(-1)
    is_outcome, _ = find_outcomes(ids, *in_order)
    near, far = (
        find_outcomes(table.index_select(0, ids.flatten()).view_as(ids), *in_order)
        for table in (longest_prefix, beginning)
    )
    there = (near[0] | far[0]) & is_outcome.logical_not()
    return _Longer(ids, torch.where(near[0], near[1], far[1]), there)


def find_outcomes(
    wanted: Int64[Tensor, "group topk"],
    in_order: Int64[Tensor, "group outcome"],
    slots: Int64[Tensor, "group outcome"],
) -> tuple[Bool[Tensor, "group topk"], Int64[Tensor, "group topk"]]:
    """Mark the ids that are outcomes of their group, and give their slots; `in_order` are the outcomes, ascending."""
    at = torch.searchsorted(in_order, wanted).clamp(max=in_order.shape[1] - 1)
    return in_order.gather(-1, at) == wanted, slots.gather(-1, at)
