"""Random batches of two models, as the methods get them and as their twins do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdm_toolkit.kd.loss_sums import LossInputs
from cdm_toolkit.kd.method import Method, find_method
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.settings import fields_of
from cdm_toolkit.kd.sparse_logprobs import top_k
from cdm_toolkit.kd.types import TeacherSignal
from cdm_toolkit.vocab_map.contextual import PairTable
from cdm_toolkit.vocab_map.projection import Projection
from cdm_toolkit.vocab_map.spelling import Spellings
from cdm_toolkit.vocab_map.spelling_trie import DEEPEST
from cdm_toolkit.vocab_map.types import Neighbours, NeighbourTable, VocabMap, single_match_map

from .twins import TWINS, Group, World, softmax


@dataclass(frozen=True)
class Case:
    """A batch of one teacher; group g holds the tokens with `token_group` g on each side."""

    world: World
    logits: Tensor
    """Of the student, a row for each label."""
    labels: Tensor
    teacher_logits: Tensor
    """A row for each token of the groups."""
    teacher_ids: Tensor
    group_t: Tensor
    rows: Tensor
    """Of the student's tokens in the groups, among the labels."""
    group_s: Tensor
    begins: tuple[int, ...] = (0,)
    """Groups that begin a text."""

    @property
    def groups(self) -> int:
        return int(self.group_t.max()) + 1

    @property
    def positions(self) -> int:
        return len(self.labels)

    def first(self, group: Tensor) -> Tensor:
        return torch.searchsorted(group, torch.arange(self.groups))

    def signal(self, *, tokens: bool) -> TeacherSignal:
        world, logits = (
            self.world,
            self.teacher_logits.to(torch.promote_types(self.logits.dtype, torch.float32)),
        )
        k = min(world.top_k, world.vocab_t)
        top = top_k(logits, k, real=world.vocab_t, rows=self.first(self.group_t))
        if not tokens:
            return TeacherSignal(top)
        chosen = logits[:, : world.vocab_t].log_softmax(-1).gather(1, self.teacher_ids[:, None])[:, 0]
        every = top_k(logits, k, real=world.vocab_t)
        return TeacherSignal(top, chosen, self.group_t, self.teacher_ids, every)

    def inputs(self, name: str) -> LossInputs:
        method = method_of(self.world, name)
        tokens = method.reads_teacher_tokens or method.reads_student_tokens
        return LossInputs(
            method=method,
            signal=self.signal(tokens=method.signal_request.token_logprobs),
            vocab_s=self.world.vocab_s,
            student_rows=self.rows[self.first(self.group_s)],
            token_rows=self.rows if tokens else None,
            token_ids=self.labels[self.rows] if tokens else None,
            token_group=self.group_s if tokens else None,
            follows=self.follows if tokens else None,
        )

    @property
    def follows(self) -> Tensor:
        return torch.tensor([g not in self.begins for g in range(self.groups)])

    def twin(self, name: str) -> tuple[float, float, float]:
        """Give kd, matched mass and pairs."""
        world = self.world
        z, zt = self.logits.detach().double().numpy(), self.teacher_logits.double().numpy()
        totals, before = np.zeros(3), None
        for g in range(self.groups):
            of_t, of_s = (np.flatnonzero(group.numpy() == g) for group in (self.group_t, self.group_s))
            rows = self.rows.numpy()[of_s]
            found = Group(
                teacher=self._likeliest(of_t[0]),
                student=softmax(z[rows[0]]),
                tokens_t=[float(softmax(zt[i, : world.vocab_t])[self.teacher_ids[i]]) for i in of_t],
                first_t=int(self.teacher_ids[of_t[0]]),
                tokens_s=[float(softmax(z[i])[self.labels[i]]) for i in rows],
                text=self.labels[rows].tolist(),
                at_tokens=[softmax(z[i]) for i in rows],
                before=None if g in self.begins else before,
                ahead=self._ahead(of_t[0], g),
            )
            before = found
            totals += TWINS[name](found, world)
        return tuple(totals.tolist())

    def _of_teacher(self, token: int) -> np.ndarray:
        return softmax(self.teacher_logits[token, : self.world.vocab_t].double().numpy())

    def _likeliest(self, token: int) -> dict[int, float]:
        """Give the teacher's top k at one of its tokens."""
        full = self._of_teacher(token)
        best = np.argsort(-full, kind="stable")[: self.world.top_k]
        return {int(i): float(full[i]) for i in best}

    def _ahead(self, first: int, group: int) -> list[tuple[int, float, dict[int, float]]]:
        """List the teacher's tokens behind one of them, up to the end of the text."""
        later = [g for g in self.begins if g > group]
        end = int((self.group_t < (min(later) if later else self.groups)).sum())
        ids = self.teacher_ids.tolist()
        return [
            (ids[i], float(self._of_teacher(i)[ids[i]]), self._likeliest(i)) for i in range(first + 1, end)
        ]


class WorldPair(TokenizerPair):
    """A pair without tokenizers, whose tables are a world's."""

    name_t, name_s = "t", "s"
    same_tokenizer = True

    def __new__(cls, world: World) -> WorldPair:
        made = super().__new__(cls)
        made.world = world
        return made

    def __init__(self, world: World) -> None:
        """Leave out what the base class makes of tokenizers."""

    @property
    def vocab_t(self) -> int:
        return self.world.vocab_t

    @property
    def vocab_s(self) -> int:
        return self.world.vocab_s

    @property
    def fingerprints(self) -> tuple[str, str]:
        return "t", "s"

    @property
    def sides(self) -> dict[str, Any]:
        return {
            "name_t": "t",
            "name_s": "s",
            "fingerprint_t": "t",
            "fingerprint_s": "s",
            "size_t": self.vocab_t,
            "size_s": self.vocab_s,
        }

    def nesting_fault(self) -> str:
        return ""

    def exact_map(self) -> VocabMap:
        return single_match_map("exact", self.sides, np.array(self.world.partner))

    def prefix_map(self) -> VocabMap:
        return self.exact_map()

    def min_ed_map(self, *, match_digits: bool = True) -> VocabMap:
        return self.exact_map()

    def spellings(self) -> Spellings:
        """Spell the ids of both sides as the world does."""
        of_t = [[*way, *[-1] * LONGEST][:LONGEST] for way in self.world.ways]
        of_s = [[*way, *[-1] * (DEEPEST + 1)][: DEEPEST + 1] for way in self.world.ways_s]
        return Spellings(np.array(of_t, np.int32), np.array(of_s, np.int32))

    def first_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.world.first_t), np.array(self.world.first_s)

    def projection(self, width: int = 4) -> Projection:
        """Give the world's, as wide as it is."""
        rows = self.world.projection
        wide = max([1, *map(len, rows)])
        padded = [[*row, *[(-1, 0.0)] * (wide - len(row))] for row in rows]
        return Projection(
            np.array([[t for t, _ in row] for row in padded], np.int32),
            np.array([[w for _, w in row] for row in padded], np.float32),
        )

    def near_ids(
        self, *, max_edit_distance: float = 0.3, match_digits: bool = True, both_directions: bool = True
    ) -> PairTable:
        """Lay out exact partners without neighbours."""
        near = NeighbourTable(
            **self.sides,
            max_edit_distance=max_edit_distance,
            match_digits=match_digits,
            t_to_s=no_neighbours(self.vocab_t),
            s_to_t=no_neighbours(self.vocab_s),
        )
        return PairTable.from_tables(self.exact_map(), near)


def no_neighbours(size: int) -> Neighbours:
    none = np.zeros(0, np.int32)
    return Neighbours(np.zeros(size + 1, np.int64), none, none.astype(np.float32), none)


def method_of(world: World, name: str) -> Method[Any, Any]:
    """Build a method with the settings of a world that it has."""
    kind = find_method(name)
    smaller = min(world.vocab_t, world.vocab_s)
    wanted = {
        "temperature": world.temperature,
        "top_k": min(world.top_k, smaller),
        "rest_bucket": world.rest,
        "beta": world.beta,
        "tau": world.tau,
        "intra_group": world.intra_group,
        "both_directions": world.both_directions,
        "joint": world.joint,
        "divergence": world.divergence,
    }
    known = {field.name for field in fields_of(kind.Settings)}
    method = kind(WorldPair(world), **{setting: wanted[setting] for setting in known & wanted.keys()})
    if "top_k" in known:  # whole vocabularies of different sizes are in no run, but in the publications' sums
        method.top_k = min(world.top_k, world.vocab_s)
    return method


LONGEST = 4
FIRST = (97, 98, 97, 256, 255, 98, 32, 32, 97, 0, 256, 99)
"""First bytes of ids."""
PARTNERS = ("some", "none", "all", "many to one")


def draw(
    name: str,
    seed: int,
    *,
    k: int = 4,
    groups: int = 4,
    partners: str = "some",
    padding: int = 3,
    temperature: float = 0.8,
    rest: bool = True,
    beta: float = 0.3,
    tau: float = 100.0,
    spread: float = 2.0,
    intra_group: bool = True,
    joint: bool = True,
    both_directions: bool = True,
    divergence: str = "kl",
    sizes: tuple[int, int] = (9, 12),
) -> Case:
    """Draw logits of both models, and groups of one to three tokens."""
    generator = torch.Generator().manual_seed(seed)
    shared = find_method(name).same_tokenizer
    vocab_t, vocab_s = (sizes[0], sizes[0]) if shared else sizes

    def logits(rows: int, width: int) -> Tensor:
        return spread * torch.randn(rows, width, generator=generator, dtype=torch.float64)

    def members(most: int) -> Tensor:
        return torch.repeat_interleave(torch.randint(1, most + 1, (groups,), generator=generator))

    group_t, group_s = members(3), members(5)
    labels = torch.randint(0, vocab_s, (len(group_s) + 2,), generator=generator)
    partner = torch.full((vocab_t,), -1)
    most = min(vocab_t, vocab_s)

    def more() -> list[int]:
        """Spell by two to five tokens, of few: several spellings begin alike."""
        return torch.randint(
            0, 3, (int(torch.randint(2, 6, (), generator=generator)),), generator=generator
        ).tolist()

    partner[:most] = torch.randperm(vocab_s, generator=generator)[:most]
    if partners == "some":
        partner[torch.randperm(vocab_t, generator=generator)[:3]] = -1
    elif partners == "none":
        partner[:] = -1
    elif partners == "many to one" and name != "cdm":  # whose pairs are one to one
        partner = torch.randint(-1, 3, (vocab_t,), generator=generator)
    ways = [[] if partners == "none" else [i] if i >= 0 else more() for i in partner.tolist()]
    ways_s = tuple(some_of(vocab_t, generator) for _ in range(vocab_s))
    teacher_ids = torch.randint(0, vocab_t, (len(group_t),), generator=generator)
    text = [i for way in ways_s for i in way]  # so that many student tokens are spelled by what stands there
    teacher_ids[: len(text)] = torch.tensor(text, dtype=torch.long)[: len(teacher_ids)]
    for group in range(groups):  # most groups hold what their first teacher token is spelled by
        way, where = ways[teacher_ids[group_t == group][0]], torch.nonzero(group_s == group)[:, 0] + 1
        labels[where[: len(way)]] = torch.tensor(way[: len(where)], dtype=torch.long)
    return Case(
        world=World(
            vocab_t=vocab_t,
            vocab_s=vocab_s,
            partner=tuple(partner.tolist()),
            top_k=min(k, vocab_t, vocab_s) if name in ("spelling", "cdm") else k,
            temperature=temperature,
            rest=rest,
            beta=beta,
            tau=tau,
            ways=tuple(map(tuple, ways)),
            longest=LONGEST,
            intra_group=intra_group,
            joint=joint,
            ways_s=ways_s,
            both_directions=both_directions,
            beginning=beginnings(ways, ways_s),
            projection=draw_projection(seed, partner.tolist(), vocab_s)
            if partners != "none"
            else ((),) * vocab_s,
            first_t=FIRST[:vocab_t],
            first_s=FIRST[::-1][:vocab_s],
        ),
        logits=logits(len(labels), vocab_s + padding),
        labels=labels,
        teacher_logits=logits(len(group_t), vocab_t + padding),
        teacher_ids=teacher_ids,
        group_t=group_t,
        rows=torch.arange(1, len(group_s) + 1),
        group_s=group_s,
    )


def some_of(vocab: int, generator: torch.Generator) -> tuple[int, ...]:
    """Spell a student id by none to six teacher tokens, of few."""
    size = int(torch.randint(0, 7, (), generator=generator))
    return tuple(torch.randint(0, min(3, vocab), (size,), generator=generator).tolist())


def beginnings(ways: Sequence[Sequence[int]], ways_s: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Give the student id that each student id begins with, by the teacher token that it begins with."""
    return tuple(ways[way[0]][0] if way and ways[way[0]] else -1 for way in ways_s)


def draw_projection(seed: int, partner: list[int], vocab_s: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Let a student id stand for the teacher ids whose partner it is, or else for some others."""
    rng = np.random.default_rng(seed)
    rows = []
    for s in range(vocab_s):
        ids = [t for t, of in enumerate(partner) if of == s]
        ids = ids or rng.choice(len(partner), rng.integers(0, 4), replace=False).tolist()
        weights = np.sort(rng.dirichlet(np.ones(len(ids))))[::-1] if ids else []
        rows.append(tuple((t, float(np.float32(w))) for t, w in zip(ids, weights, strict=True)))
    return tuple(rows)


def cast(case: Case, dtype: torch.dtype) -> Case:
    """Round both models' logits; the twin then reads the rounded ones too."""
    return replace(case, logits=case.logits.to(dtype), teacher_logits=case.teacher_logits.to(dtype))


def alike(name: str, seed: int, *, k: int = 4, temperature: float = 0.8, rest: bool = True) -> Case:
    """Draw a student that says what the teacher says, with the ids in another order and some without partner."""
    case = draw(name, seed, k=k, temperature=temperature, rest=rest, padding=2, sizes=(9, 9))
    world, tokens = case.world, len(case.group_t)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    to_student = torch.arange(9) if find_method(name).same_tokenizer else shuffled
    partner = to_student.clone()
    partner[[2, 5]] = -1
    logits = torch.full((tokens, world.vocab_s + 2), -1e4, dtype=torch.float64)
    logits[:, to_student] = case.teacher_logits[:, : world.vocab_t]
    return replace(
        case,
        world=replace(
            world,
            partner=tuple(partner.tolist()),
            ways=tuple((i,) if i >= 0 else () for i in partner.tolist()),
            ways_s=((),) * world.vocab_s,
            beginning=(-1,) * world.vocab_s,
            projection=tuple(((t, 1.0),) for t in to_student.argsort().tolist()),
            first_s=tuple(case.world.first_t[t] for t in to_student.argsort().tolist()),
        ),
        logits=logits,
        labels=to_student[case.teacher_ids],
        rows=torch.arange(tokens),
        group_s=case.group_t,
    )
