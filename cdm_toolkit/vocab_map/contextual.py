"""Contextual mapping: pair the top-k candidates of teacher and student at each position.

For one position, with candidates in descending order of probability:

1. The choices of a teacher candidate are its partners (`partners.py`: its exact partner, then its neighbours of
   both directions) among the student's candidates, ordered by distance, then by the student's probability. Only
   the nearest `CHOICES` are used.
2. In each round every unmatched teacher candidate proposes to the first of its choices that is still free, and
   each student candidate accepts the nearest proposal; ties go to the more probable teacher candidate. A rejected
   candidate has one choice fewer, so `CHOICES` rounds suffice.

So exact pairs come first, pairs are one to one, and a pair found from both directions counts once. The computation
consists of gathers and minima over integers: no device synchronisation, no data-dependent shapes, the same result
on every device, and each position is independent of the others. `contextual_reference.py` is the definition in
plain Python.
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
# A key is rank · 2¹² + slot (index among the student's candidates): the smallest key is the nearest partner, then
# the most probable. ABSENT is larger than all keys.
SLOT_BITS = 12
ABSENT = 1 << 29
LARGEST = (1 << 31) - 1
# Entries of the lookup table per step: limited by the cache on CPU, by memory on other devices.
CPU_SCRATCH = 1 << 21
DEVICE_SCRATCH = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class PairTable:
    """The partners of each teacher id and their ranks, shifted by SLOT_BITS, as tensors. The last row is empty."""

    partner_ids: Int64[Tensor, "row width"]
    partner_keys: Int32[Tensor, "row width"]
    size_s: int

    @classmethod
    def from_tables(cls, exact: VocabMap, table: NeighbourTable, *, width: int = WIDTH) -> PairTable:
        """Build the table from an exact map and a neighbour table; TokenizerMismatch if their tokenizers differ."""
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
    """The student candidate paired with each teacher candidate; without one, `mask` is False, ids and slots are −1.

    Teacher candidate i of a position is paired with the student's candidate `student_slots[i]`. `exact` marks
    pairs with equal bytes or a common role.
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
    """Pair the candidates of each position as the module describes (arXiv 2502.11104, section 3.3).

    Candidates are in descending order of probability, as returned by `torch.topk`. Candidates with an id outside
    the vocabulary (padded embedding rows, −1) or a log-probability of −inf or NaN are never paired. The result
    has no gradient. BadOption for more teacher candidates than teacher ids, or more than 4,096 on either side.
    """
    _check_top_k("the teacher's candidates", teacher_ids.shape[1], table.size_t)
    _check_top_k("the student's candidates", student_ids.shape[1], 1 << SLOT_BITS)
    teacher = _usable(teacher_ids, teacher_logprob, table.size_t, table.size_t)
    # Padding reads column size_s of the lookup table; unusable candidates write to the column after it.
    student = _usable(student_ids, student_logprob, table.size_s, table.size_s + 1)
    slots, exact = _assign(_choices(table, teacher, student), student_ids.shape[1])
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
    """Sum the teacher's probability of the candidates selected by `mask`: `Pairs.mask`, or `Pairs.exact`."""
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
    """Return the keys of the nearest partners among the student's candidates, padded with ABSENT or more."""
    columns = table.size_s + 2
    budget = CPU_SCRATCH if teacher.device.type == "cpu" else DEVICE_SCRATCH
    step = max(1, min(budget // columns, len(teacher)))
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
    """Look up each partner's slot in `slot_of`, a work table (student id -> slot) that is restored afterwards."""
    rows, width = teacher.reshape(-1), table.partner_ids.shape[1]
    slot_of.scatter_reduce_(1, student, slots.expand_as(student), "amin")
    partners = table.partner_ids.index_select(0, rows).view(len(teacher), teacher.shape[1] * width)
    keys = slot_of.gather(1, partners).view(*teacher.shape, width)
    keys += table.partner_keys.index_select(0, rows).view_as(keys)
    slot_of.scatter_(1, student, ABSENT)
    nearest = [keys.amin(-1, keepdim=True)]
    for _ in range(CHOICES - 1):
        # After the subtraction, keys already taken are negative; without the sign bit they become the largest.
        above = nearest[-1] + 1
        rest = keys.sub(above).bitwise_and_(LARGEST).amin(-1, keepdim=True)
        nearest.append(above + rest.clamp(max=ABSENT))
    return torch.cat(nearest, -1)


def _assign(
    choices: Int32[Tensor, "group topk_t choices"], topk_s: int
) -> tuple[Int64[Tensor, "group topk_t"], Bool[Tensor, "group topk_t"]]:
    """Run the rounds of proposals; return each teacher candidate's student slot (−1: none) and whether it is exact."""
    groups, topk_t, rounds = choices.shape
    no_slot = topk_s  # an extra column for teacher candidates that propose to no student candidate
    order = torch.arange(topk_t, dtype=torch.int32, device=choices.device)
    slots = choices.new_full((groups, topk_t), NO_MATCH, dtype=torch.int64)
    exact = torch.zeros_like(slots, dtype=torch.bool)
    wanted = torch.where(choices < ABSENT, choices & ((1 << SLOT_BITS) - 1), no_slot).to(torch.int64)
    wanted = wanted.view(groups, topk_t * rounds)
    taken = choices.new_zeros((groups, no_slot + 1), dtype=torch.bool)
    for round_number in range(rounds):
        if round_number:
            free = taken.gather(1, wanted).logical_not().view_as(choices) & (slots < 0).unsqueeze(-1)
            choices = torch.where(free, choices, ABSENT)
        best = choices.amin(-1)
        proposes = best < ABSENT
        slot = torch.where(proposes, best & ((1 << SLOT_BITS) - 1), no_slot).to(torch.int64)
        # Rank, then the teacher's order: the student candidate accepts the smallest.
        proposal = (best >> SLOT_BITS << SLOT_BITS) + order
        lowest = proposal.new_full((groups, no_slot + 1), LARGEST).scatter_reduce_(1, slot, proposal, "amin")
        accepted = proposes & (lowest.gather(1, slot) == proposal)
        slots = torch.where(accepted, slot, slots)
        exact |= accepted & (proposal < 1 << SLOT_BITS)
        taken.scatter_(1, torch.where(accepted, slot, no_slot), True)
    return slots, exact
