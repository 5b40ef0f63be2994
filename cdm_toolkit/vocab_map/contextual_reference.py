"""Reference implementation of `contextual.py`: one position at a time, in plain Python, from token bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from jaxtyping import Int64

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import exact_partners
from cdm_toolkit.vocab_map.keys import TokenKey, token_keys
from cdm_toolkit.vocab_map.static_reference import distance, neither_is_prefix

CHOICES = 3

Nearness = tuple[float, bool, bool]


@dataclass(frozen=True, slots=True)
class PairingRule:
    """All that decides whether two ids may be paired; `last`: last partner kept of each truncated partner list."""

    keys_t: Mapping[int, TokenKey]
    keys_s: Mapping[int, TokenKey]
    exact_t: Mapping[int, int]
    exact_s: Mapping[int, int]
    size_t: int
    size_s: int
    max_edit_distance: float
    match_digits: bool
    last: Mapping[int, int]


def make_pairing_rule(
    view_t: TokenizerView,
    view_s: TokenizerView,
    partner_ids: Int64[np.ndarray, "row width"],
    *,
    max_edit_distance: float,
    match_digits: bool,
) -> PairingRule:
    """Build the rule of two views; `partner_ids` (`partners.partner_rows`) shows where the lists were truncated."""
    return PairingRule(
        keys_t={key.id: key for key in token_keys(view_t, strip=True)},
        keys_s={key.id: key for key in token_keys(view_s, strip=True)},
        exact_t={i: other for i, other in enumerate(exact_partners(view_t, view_s).tolist()) if other >= 0},
        exact_s={i: other for i, other in enumerate(exact_partners(view_s, view_t).tolist()) if other >= 0},
        size_t=view_t.vocab_size,
        size_s=view_s.vocab_size,
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
        last={i: last for i, last in enumerate(partner_ids[:, -1].tolist()) if last < view_s.vocab_size},
    )


def select_reference(
    rule: PairingRule, teacher: Sequence[tuple[int, float]], student: Sequence[tuple[int, float]]
) -> dict[int, int]:
    """Pair the candidates (id, log-probability) of one position: student slot by teacher slot."""
    choices = {slot: _choices(rule, candidate, student) for slot, candidate in enumerate(teacher)}
    pairs: dict[int, int] = {}
    for _ in range(CHOICES):
        proposals: dict[int, list[tuple[Nearness, int]]] = {}
        for slot_t in range(len(teacher)):
            free = [choice for choice in choices[slot_t] if choice[1] not in pairs.values()]
            if slot_t not in pairs and free:
                near, slot_s = free[0]
                proposals.setdefault(slot_s, []).append((near, slot_t))
        pairs.update({min(received)[1]: slot_s for slot_s, received in proposals.items()})
    return pairs


def nearness(rule: PairingRule, teacher_id: int, student_id: int) -> Nearness | None:
    """Return (distance, blanks differ, neither is a prefix) of two ids; None if they are never paired."""
    if rule.exact_t.get(teacher_id) == student_id:
        return (-1.0, False, False)
    if teacher_id in rule.exact_t and student_id in rule.exact_s:
        return None
    key, other = rule.keys_t.get(teacher_id), rule.keys_s.get(student_id)
    if key is None or other is None or (rule.match_digits and key.must_match != other.must_match):
        return None
    far = distance(key, other)
    return (
        (far, key.blanks != other.blanks, neither_is_prefix(key, other))
        if far < rule.max_edit_distance
        else None
    )


def _choices(
    rule: PairingRule, candidate: tuple[int, float], student: Sequence[tuple[int, float]]
) -> list[tuple[Nearness, int]]:
    """Return the nearest student candidates as (nearness, slot)."""
    teacher_id, logprob = candidate
    if not (0 <= teacher_id < rule.size_t and logprob > -inf):
        return []
    found, seen = [], set()
    for slot, (student_id, logprob) in enumerate(student):
        if 0 <= student_id < rule.size_s and logprob > -inf and student_id not in seen:
            seen.add(student_id)
            near = nearness(rule, teacher_id, student_id)
            if near is not None and _kept(rule, teacher_id, student_id, near):
                found.append((near, slot))
    return sorted(found)[:CHOICES]


def _kept(rule: PairingRule, teacher_id: int, student_id: int, near: Nearness) -> bool:
    """Check that a partner was kept when the teacher id's list was truncated."""
    if teacher_id not in rule.last:
        return True
    last_near = nearness(rule, teacher_id, rule.last[teacher_id])
    assert last_near is not None
    return (near[2], near, student_id) <= (last_near[2], last_near, rule.last[teacher_id])
