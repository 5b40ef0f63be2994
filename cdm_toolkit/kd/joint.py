"""The teacher's probability of student tokens that it writes in several, along the text that it has read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cdm_toolkit.kd.divergences import first_and_count
from cdm_toolkit.kd.types import TeacherSignal, TopK
from cdm_toolkit.vocab_map.spelling_trie import DEEPEST
from cdm_toolkit.vocab_map.types import NO_MATCH

FOLLOWING = 32
"""Candidates at a later token that are looked at: what is less likely adds next to nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """Student tokens that the teacher writes in several, each with the probability of all of them; −1 for none.

    They begin with the text's own next teacher token, `first`. `taken` is their probability together, as a part of
    that of `first`, which is `first_logprob`.
    """

    ids: Int64[Tensor, "group joint"]
    masses: Float[Tensor, "group joint"]
    first: Int64[Tensor, " group"]
    first_logprob: Float[Tensor, " group"]
    taken: Float[Tensor, " group"]


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """What may follow `depth` tokens of the text; the last column is what does."""

    ends: Int64[Tensor, "group next"]
    masses: Float[Tensor, "group next"]


def joint_outcomes(
    signal: TeacherSignal,
    follows: Bool[Tensor, " group"],
    keys: Int64[Tensor, " edge"],
    ends: Int64[Tensor, " node"],
    vocab: int,
) -> Joint:
    """Walk from each group's boundary along the teacher's tokens; `keys` and `ends` are those of a `SpellingTrie`.

    By the chain rule a student token that is spelled by the text's first d tokens and one more candidate has the
    product of their probabilities, each given what stands before it: as `SpellingTrie` has it, for up to DEEPEST
    tokens. A token that is the beginning of another one in the trie keeps what that does not take.
    """
    assert signal.token_logprobs is not None
    assert signal.token_group is not None
    assert signal.token_ids is not None
    first, _ = first_and_count(signal.token_group, len(signal.top.ids))
    last = len(signal.token_ids) - 1
    text = follows.logical_not().cumsum(0).index_select(0, signal.token_group)
    node = _children(keys, vocab, torch.zeros_like(first), signal.token_ids.index_select(0, first))
    reached = signal.token_logprobs.index_select(0, first)
    levels = []
    for depth in range(1, DEEPEST):
        at = (first + depth).clamp(max=last)
        same = (first + depth <= last) & (text.index_select(0, at) == text.index_select(0, first))
        node = torch.where(same, node, NO_MATCH)
        following = _following(signal, at)
        child = _children(keys, vocab, node.unsqueeze(-1).expand_as(following.ids), following.ids)
        end = ends.index_select(0, child.clamp(min=0).flatten()).view_as(child)  # −1 for the root
        masses = torch.where(end >= 0, (reached.unsqueeze(-1) + following.logprobs).exp(), 0.0)
        levels.append(_Level(end, masses))
        node, reached = child.select(-1, -1), reached + following.logprobs.select(-1, -1)
    return _joint(levels, signal, first)


def _following(signal: TeacherSignal, at: Int64[Tensor, " group"]) -> TopK:
    """Give the likeliest candidates at some tokens of the text; the last is the token itself, and no other is it."""
    assert signal.token_logprobs is not None
    assert signal.token_ids is not None
    assert signal.token_top is not None
    own, own_logprob = (
        each.index_select(0, at).unsqueeze(-1) for each in (signal.token_ids, signal.token_logprobs)
    )
    top = signal.token_top.at(at)
    width = min(top.ids.shape[1], FOLLOWING)
    ids, logprobs = top.ids.narrow(1, 0, width), top.logprobs.narrow(1, 0, width)
    return TopK(
        torch.cat((ids, own), -1), torch.cat((logprobs.masked_fill(ids == own, -torch.inf), own_logprob), -1)
    )


def _children(
    keys: Int64[Tensor, " edge"], vocab: int, node: Int64[Tensor, "*shape"], token: Int64[Tensor, "*shape"]
) -> Int64[Tensor, "*shape"]:
    """Follow the edges of nodes along tokens; −1 where there is none, and from −1."""
    if not len(keys):
        return torch.full_like(node, NO_MATCH)
    wanted = node * vocab + token
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    there = keys.index_select(0, at.flatten()).view_as(at) == wanted
    return torch.where(there & (node >= 0), at + 1, NO_MATCH)


def _joint(levels: list[_Level], signal: TeacherSignal, first: Int64[Tensor, " group"]) -> Joint:
    """Take what is deeper off what it begins with."""
    assert signal.token_logprobs is not None
    assert signal.token_ids is not None
    taken = torch.zeros_like(levels[-1].masses.select(-1, -1))
    masses = []
    for level in reversed(levels):
        others, along = level.masses.split([level.masses.shape[1] - 1, 1], dim=-1)
        along = (along.squeeze(-1) - taken).clamp(min=0)
        masses.append(torch.cat((others, along.unsqueeze(-1)), -1))
        taken = others.sum(-1) + along + taken
    return Joint(
        torch.cat([level.ends for level in levels], -1),
        torch.cat(masses[::-1], -1),
        signal.token_ids.index_select(0, first),
        signal.token_logprobs.index_select(0, first),
        taken,
    )
