"""Contextual selection: which candidates of teacher and student stand for each other at each position.

The rule, for one position whose candidates come most probable first:

1. A teacher candidate's choices are those of its partners (`partners.py`: its exact partner, then its
   neighbours of both directions) that are among the student's candidates, ordered by distance, then by the
   student's order; the nearest `CHOICES` of them count.
2. In each round every unmatched teacher candidate asks the first of its choices that is still free, and each
   student candidate takes the nearest that asks it; of equals, the teacher's more probable. A candidate that
   is turned down has one choice less, so that `CHOICES` rounds settle all.

Exact pairs thus come first, pairs are one to one, and a pair that both directions propose counts once. All of
it is gathers and minima over integers: no host round trip, no shapes that depend on data, one result on every
device, and nothing of one position reaches another. `contextual_reference.py` is the same in plain Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from cdm_toolkit.errors import BadOption
from cdm_toolkit.vocab_map.partners import WIDTH, partner_rows
from cdm_toolkit.vocab_map.types import NO_MATCH, NeighbourTable, VocabMap

CHOICES = 3
# A key is rank · 2¹² + slot, so the least key is the nearest, then the most probable; ABSENT is above all.
SLOT_BITS = 12
ABSENT = 1 << 29
LARGEST = (1 << 31) - 1
# Scratch entries a step: on CPU what stays in the cache, elsewhere what memory allows.
CPU_SCRATCH = 1 << 21
DEVICE_SCRATCH = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class PairTable:
    """Hold each teacher id's partners and their shifted ranks on a device; the last row is empty."""

    partner_ids: Int64[Tensor, "row width"]
    partner_keys: Int32[Tensor, "row width"]
    size_s: int

    @classmethod
    def from_tables(cls, exact: VocabMap, table: NeighbourTable, *, width: int = WIDTH) -> PairTable:
        """Lay both tables out for selection; TokenizerMismatch if they are not of the same two tokenizers."""
        ids, ranks = partner_rows(exact, table, width=width)
        return cls(torch.from_numpy(ids), torch.from_numpy(ranks << SLOT_BITS), table.size_s)

    @property
    def size_t(self) -> int:
        return int(self.partner_ids.shape[0]) - 1

    def to(self, device: torch.device | str) -> PairTable:
        """Copy the table to a device."""
        return PairTable(self.partner_ids.to(device), self.partner_keys.to(device), self.size_s)


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Hold a pair for each teacher candidate that has one; elsewhere `mask` is False, ids and slots are −1.

    Pair i of a position belongs to the teacher's candidate i and the student's candidate `student_slots[i]`.
    `exact` marks the pairs of equal bytes or role.
    """

    teacher_ids: Int64[Tensor, "group topk_t"]
    student_ids: Int64[Tensor, "group topk_t"]
    student_slots: Int64[Tensor, "group topk_t"]
    mask: Bool[Tensor, "group topk_t"]
    exact: Bool[Tensor, "group topk_t"]


def select_pairs(
    table: PairTable,
    teacher_ids: Int64[Tensor, "group topk_t"],
    teacher_logprob: Float[Tensor, "group topk_t"],
    student_ids: Int64[Tensor, "group topk_s"],
    student_logprob: Float[Tensor, "group topk_s"],
) -> Pairs:
    """Pair the candidates of each position by the rule above (arXiv 2502.11104, section 3.3).

    Candidates come in descending order of probability, as `torch.topk` gives them. Those with an id outside
    the vocabulary (padded embedding rows, −1) or a log-probability that is −inf or NaN are left alone.
    Nothing here carries a gradient. BadOption for more candidates than the teacher has ids, or than 4,096.
    """
    _check_top_k("the teacher's candidates", teacher_ids.shape[1], table.size_t)
    _check_top_k("the student's candidates", student_ids.shape[1], 1 << SLOT_BITS)
    teacher = _usable(teacher_ids, teacher_logprob, table.size_t, table.size_t)
    # Column size_s of the scratch is what padding reads; unusable candidates write to the one after it.
    student = _usable(student_ids, student_logprob, table.size_s, table.size_s + 1)
    slots, exact = _settle(_choices(table, teacher, student), student_ids.shape[1])
    mask = slots >= 0
    return Pairs(
        teacher_ids=torch.where(mask, teacher_ids, NO_MATCH),
        student_ids=torch.where(mask, student_ids.gather(1, slots.clamp(min=0)), NO_MATCH),
        student_slots=slots,
        mask=mask,
        exact=exact,
    )


def matched_mass(
    mask: Bool[Tensor, "group topk_t"], teacher_logprob: Float[Tensor, "group topk_t"]
) -> Float[Tensor, " group"]:
    """Give the teacher's probability on the candidates that `mask` (of pairs, or their `exact`) marks."""
    return torch.where(mask, teacher_logprob.exp(), 0.0).sum(-1)


def check_top_k(table: PairTable, top_k: int) -> None:
    """Refuse a top-k that a vocabulary cannot fill: BadOption."""
    _check_top_k("top_k", top_k, min(table.size_t, table.size_s))


def _check_top_k(option: str, top_k: int, size: int) -> None:
    most = min(size, 1 << SLOT_BITS)
    if not 0 < top_k <= most:
        raise BadOption(option, top_k, f"a number from 1 to {most}, which the vocabularies can fill")


def _usable(
    ids: Int64[Tensor, "group topk"], logprob: Float[Tensor, "group topk"], size: int, other: int
) -> Int64[Tensor, "group topk"]:
    return torch.where((ids >= 0) & (ids < size) & (logprob > -torch.inf), ids, other)


def _choices(
    table: PairTable, teacher: Int64[Tensor, "group topk_t"], student: Int64[Tensor, "group topk_s"]
) -> Int32[Tensor, "group topk_t choices"]:
    """Give the keys of the nearest partners present at each position, ABSENT or more where none is left."""
    columns = table.size_s + 2
    room = CPU_SCRATCH if teacher.device.type == "cpu" else DEVICE_SCRATCH
    step = max(1, min(room // columns, len(teacher)))
    slot_of = teacher.new_full((step, columns), ABSENT, dtype=torch.int32)
    slots = torch.arange(student.shape[1], dtype=torch.int32, device=student.device)
    found = [
        _choices_of(table, slot_of.narrow(0, 0, len(part_t)), slots, part_t, part_s)
        for part_t, part_s in zip(teacher.split(step), student.split(step), strict=True)
    ]
    return torch.cat(found)


def _choices_of(
    table: PairTable,
    slot_of: Int32[Tensor, "group columns"],
    slots: Int32[Tensor, " topk_s"],
    teacher: Int64[Tensor, "group topk_t"],
    student: Int64[Tensor, "group topk_s"],
) -> Int32[Tensor, "group topk_t choices"]:
    """Look each partner up in `slot_of`, which maps a student id to its slot here and is left as it came."""
    rows, width = teacher.reshape(-1), table.partner_ids.shape[1]
    slot_of.scatter_reduce_(1, student, slots.expand_as(student), "amin")
    partners = table.partner_ids.index_select(0, rows).view(len(teacher), teacher.shape[1] * width)
    keys = slot_of.gather(1, partners).view(*teacher.shape, width)
    keys += table.partner_keys.index_select(0, rows).view_as(keys)
    slot_of.scatter_(1, student, ABSENT)
    nearest = [keys.amin(-1, keepdim=True)]
    for _ in range(CHOICES - 1):
        # Less what was taken, the keys up to it are negative: without their sign the largest, and last.
        above = nearest[-1] + 1
        rest = keys.sub(above).bitwise_and_(LARGEST).amin(-1, keepdim=True)
        nearest.append(above + rest.clamp(max=ABSENT))
    return torch.cat(nearest, -1)


def _settle(
    choices: Int32[Tensor, "group topk_t choices"], topk_s: int
) -> tuple[Int64[Tensor, "group topk_t"], Bool[Tensor, "group topk_t"]]:
    """Run the rounds; give each teacher candidate's student slot, −1 without one, and whether it is exact."""
    groups, topk_t, rounds = choices.shape
    nobody = topk_s  # one column more than there are slots takes what concerns no student candidate
    order = torch.arange(topk_t, dtype=torch.int32, device=choices.device)
    slots = choices.new_full((groups, topk_t), NO_MATCH, dtype=torch.int64)
    exact = torch.zeros_like(slots, dtype=torch.bool)
    wanted = torch.where(choices < ABSENT, choices & ((1 << SLOT_BITS) - 1), nobody).to(torch.int64)
    wanted = wanted.view(groups, topk_t * rounds)
    taken = choices.new_zeros((groups, nobody + 1), dtype=torch.bool)
    for turn in range(rounds):
        if turn:
            free = taken.gather(1, wanted).logical_not().view_as(choices) & (slots < 0).unsqueeze(-1)
            choices = torch.where(free, choices, ABSENT)
        ask = choices.amin(-1)
        asks = ask < ABSENT
        slot = torch.where(asks, ask & ((1 << SLOT_BITS) - 1), nobody).to(torch.int64)
        bid = (ask >> SLOT_BITS << SLOT_BITS) + order
        lowest = bid.new_full((groups, nobody + 1), LARGEST).scatter_reduce_(1, slot, bid, "amin")
        won = asks & (lowest.gather(1, slot) == bid)
        slots = torch.where(won, slot, slots)
        exact |= won & (bid < 1 << SLOT_BITS)
        taken.scatter_(1, torch.where(won, slot, nobody), True)
    return slots, exact
