"""Coverage of a mapping: of the vocabulary, of a corpus, and of a model's probability (matched mass)."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int64

from cdm_toolkit.tokdiff.classes import class_of
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.types import NeighbourTable, VocabMap

MASS_STRATEGIES = ("exact", "+min-ed", "+contextual", "+prefix")


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many of a total are matched."""

    matched: int
    total: int

    @property
    def share(self) -> float:
        """Matched share of the total; 0 where the total is 0."""
        return self.matched / self.total if self.total else 0.0


def coverage_by_ids(mapping: VocabMap) -> Coverage:
    """Count the teacher ids that have a match."""
    return Coverage(int(mapping.matched.sum()), mapping.size_t)


def coverage_by_frequency(mapping: VocabMap, counts: Int64[np.ndarray, " vocab_t"]) -> Coverage:
    """Count the tokens of a corpus that have a match; `counts` is the frequency of each teacher id."""
    return Coverage(int(counts[mapping.matched].sum()), int(counts.sum()))


def coverage_by_class(mapping: VocabMap, view_t: TokenizerView) -> dict[str, Coverage]:
    """Count the teacher ids that have a match, by class of token, the largest class first.

    Letters are split by script, as in `letters: Latin`; special tokens are a class of their own.
    """
    total: Counter[str] = Counter()
    have: Counter[str] = Counter()
    for token_id, matched in enumerate(mapping.matched.tolist()):
        name = "special" if token_id in view_t.special else _class_of(view_t.token_bytes[token_id])
        total[name] += 1
        have[name] += matched
    return {name: Coverage(have[name], count) for name, count in total.most_common()}


def _class_of(data: bytes | None) -> str:
    name = class_of(data)
    if data is None or name != "letters":
        return name
    letter = next((char for char in data.decode() if char.isalpha()), None)
    return f"letters: {_script(letter)}" if letter else "letters: marks alone"


@lru_cache(maxsize=1 << 16)
def _script(char: str) -> str:
    """Name a letter's script by the first word of its Unicode name; Python has no script property.

    >>> _script("z"), _script("ж"), _script("ש")
    ('Latin', 'Cyrillic', 'Hebrew')
    """
    return unicodedata.name(char, "unnamed").split()[0].capitalize()


def pairable_ids(exact: VocabMap, table: NeighbourTable) -> Bool[np.ndarray, " vocab_t"]:
    """Mark the teacher ids that contextual mapping can pair: those with an exact partner or a neighbour."""
    possible = exact.matched | (np.diff(table.t_to_s.indptr) > 0)
    possible[table.s_to_t.ids] = True
    return possible


def matchable_by_strategy(
    exact: VocabMap, min_ed: VocabMap, prefix: VocabMap, table: NeighbourTable
) -> Mapping[str, Bool[np.ndarray, " vocab_t"]]:
    """Mark the teacher ids that each of `MASS_STRATEGIES` matches, in addition to exact partners.

    For `+contextual` these are the ids that can be paired; which ones are depends on the student's candidates.
    """
    masks = (exact.matched, min_ed.matched, pairable_ids(exact, table), prefix.matched)
    return dict(zip(MASS_STRATEGIES, masks, strict=True))
