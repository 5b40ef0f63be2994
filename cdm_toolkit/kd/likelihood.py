"""Likelihood scoring (arXiv 2512.14954): what a teacher says of the tokens of a student that are parts of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cdm_toolkit.kd.divergences import NOTHING, bucket_divergence, first_and_count, group_sums, kd_sums
from cdm_toolkit.kd.method import Method, as_buffer
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.settings import (
    MethodSettings,
    rest_bucket_setting,
    temperature_setting,
    top_k_setting,
)
from cdm_toolkit.kd.spelling import largest_outcomes
from cdm_toolkit.kd.static_map import merged
from cdm_toolkit.kd.types import Comparison, KDSums, LogprobRequest, StudentLogits, TeacherSignal, TopK
from cdm_toolkit.vocab_map.types import NO_MATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodSettings(MethodSettings):
    """Settings of `Likelihood`."""

    temperature: float = temperature_setting()
    top_k: int | None = top_k_setting()
    rest_bucket: bool = rest_bucket_setting()


@dataclass(frozen=True, slots=True, eq=False)
class CoveredOutcomes:
    """Student tokens with the teacher's probability of each, at each student token of the groups."""

    teacher: TopK
    has_partner: Bool[Tensor, "group topk"]
    """Of the teacher's candidates: those that are spelled in student tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class _Candidates:
    """The teacher's candidates at each group, along the student tokens of the text."""

    logprobs: Float[Tensor, "group topk"]
    ways: Int64[Tensor, "group topk longest"]
    length: Int64[Tensor, "group topk"]
    """Tokens of the spelling; more than `longest` where only these are known."""
    agree: Int64[Tensor, "group topk"]
    """How many of them are the text's, from the group's first on."""
    is_own: Bool[Tensor, "group topk"]
    """Whether it is the token that stands there."""


@dataclass(frozen=True, slots=True, eq=False)
class _Earlier:
    """The group `back` groups before each."""

    back: int
    at: Int64[Tensor, " group"]
    reach: Bool[Tensor, " group"]
    """Whether there is one in the same text."""
    between: Float[Tensor, " group"]
    """log P of the teacher's tokens from there up to the group."""


@dataclass(frozen=True, slots=True, eq=False)
class _Covers:
    """The candidates of one earlier group, as covers of the text up to each position.

    A cover goes on with the student token in `ids`, −1 for none, or ends at the position.
    """

    ids: Int64[Tensor, "position topk"]
    log_weight: Float[Tensor, "position topk"]
    """log P of the cover over P of the teacher's tokens before the position's group."""
    log_total: Float[Tensor, " position"]
    """Of all covers, those that end there among them."""


class Likelihood(Method[LikelihoodSettings, CoveredOutcomes]):
    """T² KL(teacher ‖ student) at every student token, of the teacher's probability that this token comes next.

    For students whose merges are the teacher's first ones. Each teacher token is then a row of whole student tokens
    in any text, so that a teacher has a likelihood for student tokens too: P(s₁ … sₙ) is the sum over its covers,
    the sequences of teacher tokens that spell s₁ … sₙ and of which the last begins before the end and may go on
    beyond it; and P(sₙ₊₁ | s₁ … sₙ) is the share of those that go on with sₙ₊₁ (Phan et al., arXiv 2512.14954). `the`
    + `rap` may be the teacher's ` the` and a candidate for what follows, or ` therapist`, which was a candidate before:
    both count, by their probabilities.

    The publication asks the teacher again after each student token. A signal has been asked along the text's own
    teacher tokens alone, so counted are the covers all of whose tokens but the last are the text's own, and the last
    is one of the teacher's k candidates at its group. That is exact where the teacher gives nothing to other tokens
    that end inside the text. Where it does:

    - A cover that ends at a position counts in the sum over all; what follows it is no outcome, but part of the rest
      (`rest_bucket`), as are candidates beyond k at a boundary.
    - What would follow a cover that ended before is left out.
    - Positions inside a teacher token count where this token is a candidate. Those beyond k are left out there.

    The divergences of a group's positions are summed up. `matched_mass` and `pairs` are those of teacher candidates
    that are spelled in student tokens: all but special tokens that the student lacks.
    """

    name = "likelihood"
    summary = "KL at each student token, of the teacher's likelihood over all its tokens that cover the text"
    source = "arXiv 2512.14954"
    Settings = LikelihoodSettings
    color, marker = "#a50087", "8"
    nested_tokenizers = True
    needs_match = True
    reads_teacher_tokens = True
    reads_student_tokens = True

    spelling: Tensor
    """int64 [vocab_t, longest]: student tokens of each teacher id, −1 behind their end."""
    length: Tensor
    """int64 [vocab_t]: how many these are; longest + 1 where there may be more."""

    def build_tables(self, pair: TokenizerPair) -> None:
        of_t = as_buffer(pair.spellings().of_t)
        length = (of_t >= 0).sum(-1)
        longest = max(int(length.max()), 1)
        known = longest < of_t.shape[1]
        self.register_buffer("spelling", of_t.narrow(1, 0, longest).clone(), persistent=False)
        self.register_buffer(
            "length",
            length if known else torch.where(length < longest, length, longest + 1),
            persistent=False,
        )

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[CoveredOutcomes]:
        assert student.token_rows is not None
        candidates = self._candidates(student, signal)
        teacher = largest_outcomes(_next_tokens(candidates, student, signal))
        partners = (candidates.length > 0) & (candidates.logprobs > -torch.inf)
        width = teacher.ids.shape[1]
        return LogprobRequest(
            student.token_rows.repeat_interleave(width),
            teacher.ids.clamp(min=0).flatten(),
            CoveredOutcomes(teacher, partners),
        )

    def _candidates(self, student: StudentLogits, signal: TeacherSignal) -> _Candidates:
        assert signal.token_group is not None
        assert signal.token_ids is not None
        top, longest = signal.top, self.spelling.shape[1]
        ways = self.spelling.index_select(0, top.ids.flatten()).view(*top.ids.shape, longest)
        same = (ways == _windows(student, len(top.ids), longest).unsqueeze(1)) & (ways >= 0)
        first, count = first_and_count(signal.token_group, len(top.ids))
        own = signal.token_ids.index_select(0, first).unsqueeze(-1)
        return _Candidates(
            logprobs=top.logprobs,
            ways=ways,
            length=self.length.index_select(0, top.ids.flatten()).view_as(top.ids),
            agree=same.cumprod(-1).sum(-1),
            is_own=(top.ids == own) & (count == 1).unsqueeze(-1),
        )

    def compare(
        self,
        logprobs: Float[Tensor, " pick"],
        request: LogprobRequest[CoveredOutcomes],
        signal: TeacherSignal,
    ) -> Comparison:
        teacher = request.state.teacher
        student = logprobs.view_as(teacher.logprobs)
        divergence = bucket_divergence(
            teacher.logprobs,
            student,
            teacher.ids >= 0,
            temperature=self.settings.temperature,
            rest_bucket=self.settings.rest_bucket,
        )
        rows = request.rows.view_as(teacher.ids).select(1, 0)
        return Comparison(rows, teacher.ids, teacher.logprobs, student, divergence)

    def loss(
        self,
        logprobs: Float[Tensor, " pick"],
        request: LogprobRequest[CoveredOutcomes],
        signal: TeacherSignal,
    ) -> KDSums:
        compared = self.compare(logprobs, request, signal)
        return kd_sums(compared.divergence, signal.top.logprobs, request.state.has_partner)


def _texts(student: StudentLogits, groups: int) -> Int64[Tensor, " group"]:
    """Number the texts that the groups belong to: one that follows no other begins a new one."""
    if student.follows is None:
        return torch.arange(groups, device=student.rows.device)
    return student.follows.logical_not().cumsum(0)


def _windows(student: StudentLogits, groups: int, longest: int) -> Int64[Tensor, "group longest"]:
    """List the student tokens from each group's first on; −1 behind the end of the text."""
    assert student.token_ids is not None
    assert student.token_group is not None
    text, (first, _) = _texts(student, groups), first_and_count(student.token_group, groups)
    at = first.unsqueeze(-1) + torch.arange(longest, device=first.device)
    inside, at = at < len(student.token_ids), at.clamp(max=len(student.token_ids) - 1)
    of = text.index_select(0, student.token_group.index_select(0, at.flatten())).view_as(at)
    tokens = student.token_ids.index_select(0, at.flatten()).view_as(at)
    return torch.where(inside & (of == text.unsqueeze(-1)), tokens, NO_MATCH)


def _next_tokens(candidates: _Candidates, student: StudentLogits, signal: TeacherSignal) -> TopK:
    """Give the student tokens that come next at each position, with the teacher's probability of each."""
    assert student.token_group is not None
    first, _ = first_and_count(student.token_group, len(candidates.agree))
    every = torch.arange(len(student.token_group), device=first.device)
    before = every - first.index_select(0, student.token_group)
    earlier = _earlier(student, signal, candidates.ways.shape[-1])
    covers = [_covers(candidates, one, first, student.token_group, before) for one in earlier]
    return _shares(
        covers, _is_learned(candidates, student).index_select(0, student.token_group) | (before == 0)
    )


def _earlier(student: StudentLogits, signal: TeacherSignal, most: int) -> Iterator[_Earlier]:
    """Look back from each group: at itself, at the group before, and so on."""
    assert signal.token_logprobs is not None
    assert signal.token_group is not None
    groups = len(signal.top.ids)
    of_group = group_sums(signal.token_logprobs.clamp(min=NOTHING), signal.token_group, groups)
    text, every = _texts(student, groups), torch.arange(groups, device=of_group.device)
    between = torch.zeros_like(of_group)
    for back in range(most + 1):  # so far back a candidate can end at the position
        at = (every - back).clamp(min=0)
        between = between + of_group.index_select(0, at) if back else between
        yield _Earlier(back, at, (text.index_select(0, at) == text) & (every >= back), between)


def _covers(
    candidates: _Candidates,
    earlier: _Earlier,
    first: Int64[Tensor, " group"],
    group: Int64[Tensor, " position"],
    before: Int64[Tensor, " position"],
) -> _Covers:
    """Find the candidates of one earlier group that cover the text from there up to each position.

    `first` is the first student token of each group, `before` counts the group's tokens before the position.
    """
    done = ((first - first.index_select(0, earlier.at)).index_select(0, group) + before).unsqueeze(-1)
    at, longest = earlier.at.index_select(0, group), candidates.ways.shape[-1]
    length, agree = (each.index_select(0, at) for each in (candidates.length, candidates.agree))
    logprobs = candidates.logprobs.index_select(0, at)
    fits = (agree >= done) & (logprobs > -torch.inf) & earlier.reach.index_select(0, group).unsqueeze(-1)
    goes_on, ends = fits & (length > done) & (done < longest), fits & (length == done) & (done > 0)
    if earlier.back == 1:  # the text's own tokens up to a boundary are the cover that its candidates follow
        ends = ends & (candidates.is_own.index_select(0, at) & (before == 0).unsqueeze(-1)).logical_not()
    weight = logprobs - earlier.between.index_select(0, group).unsqueeze(-1)
    total = weight.masked_fill((goes_on | ends).logical_not(), -torch.inf).logsumexp(-1)
    if earlier.back == 0:  # at a boundary all of the distribution, with what is beyond k
        total = torch.where(before == 0, 0.0, total)
    column = done.clamp(max=longest - 1).unsqueeze(-1).expand(-1, length.shape[1], 1)
    ids = candidates.ways.index_select(0, at).gather(-1, column).squeeze(-1)
    return _Covers(
        torch.where(goes_on, ids, NO_MATCH), weight.masked_fill(goes_on.logical_not(), -torch.inf), total
    )


def _shares(covers: list[_Covers], counts: Bool[Tensor, " position"]) -> TopK:
    """Divide by the sum over all covers; positions that do not count have no outcome."""
    total = torch.stack([each.log_total for each in covers]).logsumexp(0)
    ids = torch.cat([each.ids for each in covers], dim=-1)
    weights = torch.cat([each.log_weight for each in covers], dim=-1)
    ids = torch.where(counts.unsqueeze(-1), ids, NO_MATCH)
    shares = weights - torch.where(counts, total, 0.0).unsqueeze(-1)
    return merged(TopK(ids, shares.masked_fill(ids < 0, -torch.inf)), ids)


def _is_learned(candidates: _Candidates, student: StudentLogits) -> Bool[Tensor, " group"]:
    """Say of which groups the positions inside count: one teacher token, a candidate, spelled as the text is."""
    assert student.token_group is not None
    _, count = first_and_count(student.token_group, len(candidates.agree))
    spelled = (candidates.length == count.unsqueeze(-1)) & (candidates.agree == candidates.length)
    return (candidates.is_own & spelled & (candidates.logprobs > -torch.inf)).any(-1)
