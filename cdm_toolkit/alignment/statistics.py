"""Statistics of two tokenizers on a corpus: token counts, shared boundaries, kinds of groups, by class of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cdm_toolkit.alignment.aligners import TextAlignment
from cdm_toolkit.alignment.groups import KINDS
from cdm_toolkit.tokdiff.classes import CLASSES, class_of
from cdm_toolkit.tokdiff.spans import TokenSpans


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of bytes, tokens and groups in one class of text, or in all of it."""

    bytes: int
    tokens_t: int
    tokens_s: int
    kinds: Mapping[str, int]

    @property
    def groups(self) -> int:
        """Count the groups that have tokens on both sides."""
        return sum(count for kind, count in self.kinds.items() if "0" not in kind)

    def share(self, kind: str) -> float:
        """Share of a kind among the groups with tokens on both sides."""
        return self.kinds.get(kind, 0) / self.groups if self.groups else 0.0

    @property
    def bytes_per_token(self) -> tuple[float, float]:
        """Mean bytes per token of each side."""
        return self.bytes / max(self.tokens_t, 1), self.bytes / max(self.tokens_s, 1)


@dataclass(frozen=True, slots=True)
class PairStatistics:
    """Summary of how two tokenizers split one text or many."""

    texts: int
    total: Tally
    boundaries_t: int
    boundaries_s: int
    shared: int
    """Boundaries inside texts that both sides have. The ends of texts are not counted."""
    inexact: int
    """Groups with tokens on both sides whose bytes differ."""
    classes: Mapping[str, Tally]

    @property
    def agreement(self) -> float:
        """Jaccard index of the boundaries: shared ones over those of either side; 1 where there are none."""
        either = self.boundaries_t + self.boundaries_s - self.shared
        return self.shared / either if either else 1.0


def measure(aligned: TextAlignment) -> PairStatistics:
    """Measure one aligned text. A group's class is the class of the text that it covers."""
    t, s, alignment = aligned.t, aligned.s, aligned.alignment
    ends_t, ends_s = _inner_ends(t), _inner_ends(s)
    groups = alignment.groups
    both = (groups[:, 0] < groups[:, 1]) & (groups[:, 2] < groups[:, 3])
    t0, t1, s0, s1 = groups[both].T
    start = np.minimum(t.start[t0], s.start[s0])
    end = np.maximum(t.end[t1 - 1], s.end[s1 - 1])
    kinds = alignment.kind_indices()[both]
    found = [_class_of(t.text_bytes[i:j]) for i, j in zip(start.tolist(), end.tolist(), strict=True)]
    class_number = np.array([CLASSES.index(name) for name in found], np.int64)
    classes = {}
    for name in dict.fromkeys(found):
        here = class_number == CLASSES.index(name)
        counts = np.bincount(kinds[here], minlength=len(KINDS)).tolist()
        classes[name] = Tally(
            int((end - start)[here].sum()),
            int((t1 - t0)[here].sum()),
            int((s1 - s0)[here].sum()),
            dict(zip(KINDS, counts, strict=True)),
        )
    return PairStatistics(
        texts=1,
        total=Tally(len(t.text_bytes), len(t), len(s), alignment.kind_counts()),
        boundaries_t=len(ends_t),
        boundaries_s=len(ends_s),
        shared=len(np.intersect1d(ends_t, ends_s, assume_unique=True)),
        inexact=int((~alignment.exact & both).sum()),
        classes=classes,
    )


def total(parts: Iterable[PairStatistics]) -> PairStatistics:
    """Add the statistics of many texts."""
    found = list(parts)
    names = dict.fromkeys(name for part in found for name in part.classes)
    return PairStatistics(
        texts=sum(part.texts for part in found),
        total=_added([part.total for part in found]),
        boundaries_t=sum(part.boundaries_t for part in found),
        boundaries_s=sum(part.boundaries_s for part in found),
        shared=sum(part.shared for part in found),
        inexact=sum(part.inexact for part in found),
        classes={
            name: _added([part.classes[name] for part in found if name in part.classes]) for name in names
        },
    )


def _added(tallies: list[Tally]) -> Tally:
    kinds: Counter[str] = Counter()
    for tally in tallies:
        kinds.update(tally.kinds)
    return Tally(
        sum(tally.bytes for tally in tallies),
        sum(tally.tokens_t for tally in tallies),
        sum(tally.tokens_s for tally in tallies),
        dict(kinds),
    )


def _inner_ends(spans: TokenSpans) -> np.ndarray:
    """List the byte offsets inside the text at which it can be cut between two tokens."""
    if len(spans) == 0:
        return np.zeros(0, np.int64)
    ends = spans.end[:-1][spans.end[:-1] <= spans.start[1:]]
    return np.unique(ends[(ends > 0) & (ends < len(spans.text_bytes))])


@lru_cache(maxsize=1 << 16)
def _class_of(data: bytes) -> str:
    return class_of(data)
