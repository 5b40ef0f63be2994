"""Every method once more, in float64 NumPy, from its formula: one group after the other, one id after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CUT = -math.expm1(-1e-6)
"""The least that a rest counts."""


@dataclass(frozen=True)
class Group:
    """What a method knows of one group, in probabilities."""

    teacher: dict[int, float]
    """Of the teacher's top k, best first."""
    student: np.ndarray
    """Of all columns of the student's logits, padding included."""
    tokens_t: list[float]
    """Of the tokens that the group holds."""
    first_t: int
    """The first of them."""
    tokens_s: list[float]
    text: list[int]
    """The student's tokens that the group holds."""
    at_tokens: list[np.ndarray]
    """Of all columns of the student's logits, at each of them."""
    before: Group | None = None
    """The group that ends where this one begins."""
    ahead: Sequence[tuple[int, float, dict[int, float]]] = ()
    """The teacher's tokens of the text behind the first: the id, its probability, and the top k there."""


@dataclass(frozen=True)
class World:
    """What holds for all groups."""

    vocab_t: int
    vocab_s: int
    partner: Sequence[int]
    top_k: int
    temperature: float
    rest: bool
    beta: float
    tau: float
    ways: Sequence[Sequence[int]]
    """The student tokens that each teacher id is spelled by; none for an id without."""
    beginning: Sequence[int]
    """The student id that stands for the teacher token that each student id begins with."""
    longest: int
    """Tokens of a spelling that a method knows."""
    intra_group: bool = True
    joint: bool = False
    """Give student tokens that the teacher writes in several the probability of all of them."""
    deepest: int = 4
    ways_s: Sequence[Sequence[int]] = ()
    """The teacher tokens that each student id is spelled by."""
    both_directions: bool = True
    """Look from the student's candidates too."""
    outcomes: int = 128
    projection: Sequence[Sequence[tuple[int, float]]] = ()
    """The teacher ids that each student id stands for, with weights."""
    first_t: Sequence[int] = ()
    """The first byte of each id; 256 for one without bytes."""
    first_s: Sequence[int] = ()
    divergence: str = "kl"


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def heated(masses: Sequence[float], temperature: float, rest: bool) -> np.ndarray:
    """Append what is missing to 1, take the T-th roots, renormalise."""
    every = np.array([*masses, max(1 - sum(masses), CUT)] if rest else masses, np.float64)
    if not every.size:
        return every
    logs = np.log(every) / temperature
    return softmax(logs)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def jsd(p: np.ndarray, q: np.ndarray, beta: float) -> float:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def best(row: np.ndarray, world: World) -> list[int]:
    """Give the student's top k ids."""
    return np.argsort(-row[: world.vocab_s], kind="stable")[: world.top_k].tolist()


def l1(p: Sequence[float], q: Sequence[float]) -> float:
    width = max(len(p), len(q))
    padded = [sorted(side, reverse=True) + [0.0] * (width - len(side)) for side in (p, q)]
    return sum(abs(a - b) for a, b in zip(*padded, strict=True))


def by_partner(group: Group, world: World) -> dict[int, float]:
    """Sum the teacher's probabilities up over the student ids."""
    masses: dict[int, float] = {}
    for teacher_id, mass in group.teacher.items():
        if (student_id := world.partner[teacher_id]) >= 0:
            masses[student_id] = masses.get(student_id, 0.0) + mass
    return masses


def matched(group: Group, world: World) -> tuple[float, int]:
    with_partner = [mass for teacher_id, mass in group.teacher.items() if world.partner[teacher_id] >= 0]
    return sum(with_partner), len(with_partner)


def bucket(p: Sequence[float], q: Sequence[float], world: World, divergence: str = "kl") -> float:
    teacher, student = (heated(masses, world.temperature, world.rest) for masses in (p, q))
    apart = {
        "kl": lambda: kl(teacher, student),
        "reverse-kl": lambda: kl(student, teacher),
        "jsd": lambda: jsd(teacher, student, world.beta),
    }
    return world.temperature**2 * apart[divergence]()


def static_map_twin(group: Group, world: World) -> tuple[float, float, int]:
    masses = by_partner(group, world)
    kd = bucket(list(masses.values()), [group.student[i] for i in masses], world, world.divergence)
    return kd, *matched(group, world)


def spelling_twin(group: Group, world: World) -> tuple[float, float, int]:
    """Walk through the group's tokens: who of the candidates is still spelled like the text, and goes on how?"""
    candidates = group.teacher
    kd = 0.0
    expected = len(group.text) < world.longest and any(
        list(world.ways[teacher_id]) == group.text for teacher_id in candidates
    )
    for place, student in enumerate(group.at_tokens):
        if place and not (expected and world.intra_group):
            break
        masses: dict[int, float] = {}
        for teacher_id, mass in candidates.items():
            way = list(world.ways[teacher_id])
            if way[:place] == group.text[:place] and len(way) > place:
                masses[way[place]] = masses.get(way[place], 0.0) + mass
        if not place and world.joint:
            masses = with_joint(masses, group, world)
        if not masses:
            continue
        weight = 1.0
        if place:
            goes_on = sum(masses.values())
            ended = sum(mass for i, mass in candidates.items() if list(world.ways[i]) == group.text[:place])
            weight = goes_on / (goes_on + ended + max(1 - sum(candidates.values()), 0))
            masses = {i: mass / goes_on for i, mass in masses.items()}
        masses = dict(sorted(masses.items(), key=lambda item: -item[1])[: world.outcomes])
        q = {i: float(student[i]) for i in masses}
        if not place and world.both_directions:
            for i in best(student, world):
                nearest = next((j for j in prefixes(i, world) if j in masses), None)
                if i not in masses and nearest is not None:
                    q[nearest] += student[i]
        kd += weight * bucket(list(masses.values()), list(q.values()), world, world.divergence)
    spelled = [mass for teacher_id, mass in candidates.items() if world.ways[teacher_id]]
    return kd, sum(spelled), len(spelled)


def joined(world: World) -> dict[tuple[int, ...], int]:
    """Give the student id of each sequence of two to `deepest` teacher tokens, the lowest of several."""
    found: dict[tuple[int, ...], int] = {}
    for student_id, way in enumerate(world.ways_s):
        if 1 < len(way) <= world.deepest:
            found.setdefault(tuple(way), student_id)
    return found


def prefixes(student_id: int, world: World) -> list[int]:
    """List what a student token counts for: its longest beginning that is one, and that of its first token."""
    way, ids = tuple(world.ways_s[student_id]), joined(world)
    sizes = range(len(way) - 1, 1, -1) if len(way) <= world.deepest else ()
    longest = [ids[way[:size]] for size in sizes if way[:size] in ids]
    return [*longest[:1], world.beginning[student_id]]


def with_joint(masses: dict[int, float], group: Group, world: World) -> dict[int, float]:
    """Walk along the text: each sequence that is a student token takes its probability off what it begins with."""
    text, ids, found = (group.first_t, *(token for token, _, _ in group.ahead)), joined(world), {}
    reached = group.tokens_t[0]
    for depth, (token, mass, top) in enumerate(group.ahead, 1):
        for candidate, probability in (top | {token: mass}).items():
            if (way := (*text[:depth], candidate)) in ids:
                found[way] = reached * probability
        reached *= mass
    for depth in range(len(text), 1, -1):
        if (here := text[:depth]) in found:
            found[here] = max(
                found[here] - sum(found[way] for way in found if way[:depth] == here != way), 0.0
            )
    if begins := world.ways[group.first_t]:
        there = group.teacher.get(group.first_t, 0.0)
        left = max(group.tokens_t[0] - sum(found.values()), 0.0)
        masses[begins[0]] = masses.get(begins[0], 0.0) - there + left
    for way, mass in found.items():
        masses[ids[way]] = masses.get(ids[way], 0.0) + mass
    return masses


def likelihood_twin(group: Group, world: World) -> tuple[float, float, int]:
    """List the candidates of this group and of those before it that cover the text up to each token."""
    way = list(world.ways[group.first_t])
    expected = len(group.tokens_t) == 1 and group.first_t in group.teacher and way == group.text
    kd = 0.0
    for place, student in enumerate(group.at_tokens):
        if place and not (expected and len(way) < world.longest):
            break
        masses, total = covers(group, place, world)
        p = [mass / total for mass in masses.values()]
        kd += bucket(p, [float(student[i]) for i in masses], world)
    spelled = [mass for teacher_id, mass in group.teacher.items() if world.ways[teacher_id]]
    return kd, sum(spelled), len(spelled)


def covers(group: Group, place: int, world: World) -> tuple[dict[int, float], float]:
    """Give what of the covers goes on with each student token, and the sum over all."""
    masses: dict[int, float] = {}
    total = 0.0 if place else 1.0
    at: Group | None = group
    text, weight = group.text[:place], 1.0
    while at is not None:
        for teacher_id, mass in at.teacher.items():
            way = list(world.ways[teacher_id])
            shown = way[: world.longest]
            if shown[: len(text)] != text:
                continue
            if len(shown) > len(text):
                masses[shown[len(text)]] = masses.get(shown[len(text)], 0.0) + weight * mass
                total += weight * mass if text else 0.0
            elif len(way) < world.longest and not is_text_itself(at, teacher_id, group, place):
                total += weight * mass if text else 0.0
        at = at.before
        if at is not None:
            text, weight = at.text + text, weight / math.prod(at.tokens_t)
    return masses, total


def is_text_itself(at: Group, teacher_id: int, group: Group, place: int) -> bool:
    """Say whether a candidate is the token before the group, where a boundary is asked about."""
    return at is group.before and not place and len(at.tokens_t) == 1 and teacher_id == at.first_t


def cdm_twin(group: Group, world: World) -> tuple[float, float, int]:
    """No neighbours: the exact partners, one to one, wherever the student ranks them."""
    return static_map_twin(group, world)


def uld_twin(group: Group, world: World) -> tuple[float, float, int]:
    sides = []
    for masses, size in (
        (list(group.teacher.values()), world.vocab_t),
        ([group.student[i] for i in best(group.student, world)], world.vocab_s),
    ):
        sides.append(heated(masses, world.temperature, len(masses) < size)[: len(masses)].tolist())
    ranks = min(len(side) for side in sides)
    return l1(*sides), sum(list(group.teacher.values())[:ranks]), ranks


def alm_twin(group: Group, world: World) -> tuple[float, float, int]:
    chances = []
    for tokens in (group.tokens_t, group.tokens_s):
        heads = math.exp(sum(map(math.log, tokens)) / world.tau - 1e-6)
        chances.append(np.array([heads, 1 - heads]))
    return kl(*chances), math.prod(group.tokens_t), 1


def sampled_reverse_kl_twin(group: Group, world: World) -> tuple[float, float, int]:
    of_t, of_s = (sum(map(math.log, tokens)) for tokens in (group.tokens_t, group.tokens_s))
    apart = abs(of_s - of_t)
    return apart**2 / 2 if apart < 20 else 20 * (apart - 10), math.exp(of_t), 1


def gold_twin(group: Group, world: World) -> tuple[float, float, int]:
    teacher = by_partner(group, world)
    others_t = [mass for teacher_id, mass in group.teacher.items() if world.partner[teacher_id] < 0]
    others_s = [group.student[i] for i in best(group.student, world) if i not in set(world.partner)]
    whole_t = len(group.teacher) == world.vocab_t
    whole_s = whole_t and world.top_k >= world.vocab_s
    cut = len(teacher)
    p = heated([*teacher.values(), *others_t], world.temperature, not whole_t) * math.prod(group.tokens_t[1:])
    q = heated([*(group.student[i] for i in teacher), *others_s], world.temperature, not whole_s)
    q = q * math.prod(group.tokens_s[1:])
    weight = sum(i >= 0 for i in world.partner) / world.vocab_t
    kd = weight * jsd(p[:cut], q[:cut], world.beta) + (1 - weight) * l1(
        p[cut : cut + len(others_t)].tolist(), q[cut : cut + len(others_s)].tolist()
    )
    return kd, *matched(group, world)


def x_token_twin(group: Group, world: World) -> tuple[float, float, int]:
    """Follow each student id that is read to the teacher's candidates that it stands for."""
    entries = [(s, t, w) for s, row in enumerate(world.projection) for t, w in row]
    likeliest = set(best(group.student, world))
    for candidate in group.teacher:
        standing = sorted((-w, s) for s, t, w in entries if t == candidate)
        likeliest |= {s for _, s in standing[:4]}
    masses, read = dict.fromkeys(group.teacher, 0.0), 0.0
    for s, t, w in entries:
        if s in likeliest and t in masses:
            masses[t] += w * group.student[s] ** (1 / world.temperature)
            read += w * group.student[s]
    rest = world.rest and len(group.teacher) < world.vocab_t
    p = heated(list(group.teacher.values()), world.temperature, rest)
    every = [*masses.values(), *([max(1 - read, 1e-6) ** (1 / world.temperature)] if rest else [])]
    q = np.array(every) / (sum(every) + 1e-10) + 1e-10
    reached = [mass for t, mass in group.teacher.items() if any(t == other for _, other, _ in entries)]
    return world.temperature**2 * kl(p, q), sum(reached), len(reached)


def simct_twin(group: Group, world: World) -> tuple[float, float, int]:
    """List the outcomes of both: shared ids, the text where it is several tokens, and what none of these has."""
    shared = by_partner(group, world)
    p, q = list(shared.values()), [float(group.student[i]) for i in shared]
    taken_t, taken_s = sum(p), sum(q)
    if len(group.tokens_t) > 1 or len(group.tokens_s) > 1:
        for outcomes, tokens in ((p, group.tokens_t), (q, group.tokens_s)):
            outcomes.append(math.exp(float(np.mean(np.log(tokens)))))
        is_shared = group.first_t in group.teacher and world.partner[group.first_t] >= 0
        taken_t += 0 if is_shared else group.tokens_t[0]
        taken_s += 0 if group.text[0] in shared else group.tokens_s[0]
    if world.rest:
        p.append(max(1 - taken_t, CUT))
        q.append(max(1 - taken_s, CUT))
    sides = (heated(side, world.temperature, False) for side in (q, p))
    return world.temperature**2 * kl(*sides), *matched(group, world)


def byte_marginal_twin(group: Group, world: World) -> tuple[float, float, int]:
    """Raise λ in max(least, λ q) until it sums to one, by bisection."""
    q, least = np.zeros(257), np.zeros(257)
    for i in range(world.vocab_s):
        q[world.first_s[i]] += group.student[i]
    for i, mass in group.teacher.items():
        least[world.first_t[i]] += mass
    low, high = 0.0, 1 / q[q > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(least, middle * q).sum() < 1 else (low, middle)
    p = np.maximum(least, low * q)
    return kl(p, q), *_all(group)


def _shared(group: Group, world: World) -> tuple[np.ndarray, np.ndarray]:
    rest = len(group.teacher) < world.vocab_s
    sides = (list(group.teacher.values()), [group.student[i] for i in group.teacher])
    p, q = (heated(side, world.temperature, rest) for side in sides)
    return p, q


def _all(group: Group) -> tuple[float, int]:
    return sum(group.teacher.values()), len(group.teacher)


def kl_twin(group: Group, world: World) -> tuple[float, float, int]:
    p, q = _shared(group, world)
    return world.temperature**2 * kl(p, q), *_all(group)


def reverse_kl_twin(group: Group, world: World) -> tuple[float, float, int]:
    p, q = _shared(group, world)
    return world.temperature**2 * kl(q, p), *_all(group)


def jsd_twin(group: Group, world: World) -> tuple[float, float, int]:
    return world.temperature**2 * jsd(*_shared(group, world), world.beta), *_all(group)


TWINS = {
    "spelling": spelling_twin,
    "cdm": cdm_twin,
    "exact": static_map_twin,
    "min-ed": static_map_twin,
    "prefix": static_map_twin,
    "uld": uld_twin,
    "alm": alm_twin,
    "sampled-reverse-kl": sampled_reverse_kl_twin,
    "gold": gold_twin,
    "likelihood": likelihood_twin,
    "simct": simct_twin,
    "x-token": x_token_twin,
    "byte-marginal": byte_marginal_twin,
    "kl": kl_twin,
    "reverse-kl": reverse_kl_twin,
    "jsd": jsd_twin,
}
