"""Contextual mapping by spelling: which student token comes next in what the teacher is about to write.

At a shared boundary the teacher's candidates stand for the student tokens that their spellings begin with. At a
student token inside a group, the part of the group before it is known, and only the candidates whose spelling
begins with it are left: what they spell next is the teacher's distribution there. By the chain rule the two are, in
expectation over the teacher's text, the divergence over whole teacher tokens, seen through the student's spelling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cdm_toolkit.distill.losses.buckets import NOTHING, bucket_kl
from cdm_toolkit.distill.losses.pick import top_k
from cdm_toolkit.distill.losses.reading import kd_parts
from cdm_toolkit.distill.losses.record import KdParts, Reading, StudentSees, TeacherSays, TopK
from cdm_toolkit.distill.losses.static_map import merged
from cdm_toolkit.vocab_map.types import NO_MATCH

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor

LIKELIEST = 32
"""Student candidates among which longer tokens are looked for: what is less likely adds next to nothing."""
OUTCOMES = 128
"""Student tokens that are compared at a place: many candidates come to few of them."""
FAR = 1 << 40
"""Sorts behind every id."""


@dataclass(frozen=True, slots=True, eq=False)
class SpelledSettings:
    """What the mapping needs beside the logits."""

    spelling: Int64[Tensor, "vocab_t longest"]
    """The student tokens that each teacher id is spelled by, −1 behind its end."""
    beginning: Int64[Tensor, " vocab_s"] | None
    """The student id that stands for the first teacher token of each student id's spelling, −1 without one: there
    a longer student token counts. None leaves out what the student's candidates are spelled by."""
    top_k: int
    temperature: float = 1.0
    rest_bucket: bool = True
    inside: bool = True
    """Teach the tokens inside a group too."""


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Where the student is read: a flat list; the first of each group comes first, in the order of groups."""

    rows: Int64[Tensor, " place"]
    group: Int64[Tensor, " place"]
    before: Int64[Tensor, " place"]
    """Tokens of the group that stand before the place."""


def spelled(sees: StudentSees, says: TeacherSays, settings: SpelledSettings) -> Reading:
    """Give T² KL(teacher ‖ student) over the student tokens that come next in the teacher's spelled candidates.

    Candidates whose spellings go on with one token are one outcome. Both distributions are renormalised over
    the outcomes at temperature T, with all other probability as one more where `rest_bucket` is set. At a
    boundary a student token of its likeliest that is no outcome, such as `48` where the teacher writes `4` and
    `8`, counts for the outcome that its own spelling begins with. The divergences of a group's places are
    summed up. Places inside a group count where the group is one teacher token, and a candidate: of how a word
    goes on that the teacher did not expect, its candidates know next to nothing. The outcomes are the
    OUTCOMES with the most of the teacher's probability; smaller ones are a part of the rest on both sides.

    A mapping of this tool's own, in place of the pairs of arXiv 2502.11104, section 3.3.
    """
    groups = len(says.top.ids)
    candidates = says.top
    places = _places(sees, groups, settings.inside)
    partners, logprobs = _next_tokens(sees, candidates, places, settings.spelling)
    teacher = _largest(merged(TopK(partners, logprobs), partners))
    width = teacher.ids.shape[1]
    rows, ids = places.rows.repeat_interleave(width), teacher.ids.clamp(min=0).flatten()
    longer = None
    if settings.beginning is not None:
        k = min(settings.top_k, LIKELIEST)
        likeliest = top_k(sees.logits, k, real=sees.vocab, rows=sees.rows, lse=sees.lse).ids
        longer = _longer(likeliest, teacher.ids.narrow(0, 0, groups), settings.beginning)
        rows = torch.cat((rows, sees.rows.repeat_interleave(longer.ids.shape[1])))
        ids = torch.cat((ids, longer.ids.flatten()))
    matched = partners.narrow(0, 0, groups) >= 0

    def divergence(picked: Tensor) -> KdParts:
        own = picked.narrow(0, 0, teacher.ids.numel()).view_as(teacher.logprobs)
        if longer is not None:
            more = picked.narrow(0, teacher.ids.numel(), longer.ids.numel()).view(longer.ids.shape)
            at_boundary, inside = own.split([groups, len(own) - groups])
            own = torch.cat((longer.added_to(at_boundary, more), inside))
        between = bucket_kl(
            teacher.logprobs,
            own,
            teacher.ids >= 0,
            temperature=settings.temperature,
            rest_bucket=settings.rest_bucket,
        )
        return kd_parts(between, candidates.logprobs, matched)

    return Reading(rows, ids, divergence)


def _places(sees: StudentSees, groups: int, inside: bool) -> _Places:
    every = torch.arange(groups, device=sees.rows.device)
    if not inside:
        return _Places(sees.rows, every, torch.zeros_like(every))
    assert sees.token_rows is not None
    assert sees.token_group is not None
    first = torch.searchsorted(sees.token_group, every)
    before = torch.arange(len(sees.token_group), device=every.device) - first.index_select(
        0, sees.token_group
    )
    order = before.gt(0).to(torch.int64).sort(stable=True).indices  # without asking how many are inside
    return _Places(*(each.index_select(0, order) for each in (sees.token_rows, sees.token_group, before)))


def _next_tokens(
    sees: StudentSees, candidates: TopK, places: _Places, spelling: Int64[Tensor, "vocab_t longest"]
) -> tuple[Int64[Tensor, "place candidate"], Float[Tensor, "place candidate"]]:
    """Give the student token that each candidate goes on with, −1 where it does not, and its log-probability.

    Inside a group that is the probability given what of the group is spelled already.
    """
    groups, longest = len(candidates.ids), spelling.shape[1]
    possible = candidates.logprobs > -torch.inf
    first = spelling.select(1, 0).index_select(0, candidates.ids.flatten()).view_as(candidates.ids)
    at_boundary = torch.where(possible, first, NO_MATCH)

    group = places.group.narrow(0, groups, len(places.group) - groups)
    before = places.before.narrow(0, groups, len(group))
    ids, left = candidates.ids.index_select(0, group), possible.index_select(0, group)
    ways = spelling.index_select(0, ids.flatten()).view(*ids.shape, longest)
    text = _text(sees, groups, longest)
    # a spelling of `longest` tokens may have been cut: whether it is the text cannot be told
    is_text = left & (text[-1] == NO_MATCH).index_select(0, group).unsqueeze(-1)
    for nth, token in enumerate(text):
        same = ways.select(-1, nth) == token.index_select(0, group).unsqueeze(-1)
        left, is_text = left & (same | (before <= nth).unsqueeze(-1)), is_text & same
    left = left & is_text.any(-1, keepdim=True)
    at = before.clamp(max=longest - 1).view(-1, 1, 1).expand(-1, ids.shape[1], 1)
    inside = torch.where(left, ways.gather(-1, at).squeeze(-1), NO_MATCH)
    given = _given(candidates.logprobs.index_select(0, group), inside >= 0)
    return torch.cat((at_boundary, inside)), torch.cat((candidates.logprobs, given))


def _text(sees: StudentSees, groups: int, most: int) -> list[Int64[Tensor, " group"]]:
    """List the first token of each group, the second, ...; −1 behind a group's end."""
    assert sees.token_ids is not None
    assert sees.token_group is not None
    every = torch.arange(groups, device=sees.token_ids.device)
    first = torch.searchsorted(sees.token_group, every)
    end = torch.searchsorted(sees.token_group, every, right=True)
    last = len(sees.token_ids) - 1
    return [
        torch.where(
            first + nth < end, sees.token_ids.index_select(0, (first + nth).clamp(max=last)), NO_MATCH
        )
        for nth in range(most)
    ]


def _given(
    logprobs: Float[Tensor, "place candidate"], mask: Bool[Tensor, "place candidate"]
) -> Float[Tensor, "place candidate"]:
    """Make the candidates in `mask` all that there is, where there are any."""
    total = logprobs.masked_fill(mask.logical_not(), NOTHING).logsumexp(-1, keepdim=True)
    return logprobs - torch.where(mask.any(-1, keepdim=True), total, 0.0)


def _largest(outcomes: TopK) -> TopK:
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
    beginning: Int64[Tensor, " vocab_s"],
) -> _Longer:
    in_order = torch.where(outcomes >= 0, outcomes, FAR).sort(-1)

    def find(wanted: Int64[Tensor, "group topk"]) -> tuple[Tensor, Tensor]:
        at = torch.searchsorted(in_order.values, wanted).clamp(max=outcomes.shape[1] - 1)
        return in_order.values.gather(-1, at) == wanted, in_order.indices.gather(-1, at)

    is_outcome, _ = find(ids)
    there, slots = find(beginning.index_select(0, ids.flatten()).view_as(ids))
    return _Longer(ids, slots, there & is_outcome.logical_not())
