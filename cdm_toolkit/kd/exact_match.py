"""Exact match: KL over ids with the same bytes (arXiv 2301.12726)."""

from __future__ import annotations

from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.static_map import StaticMap
from cdm_toolkit.vocab_map.types import VocabMap


class ExactMatch(StaticMap):
    """T² KL(teacher ‖ student) over ids with the same bytes or role, and the rest (Fu et al., arXiv 2301.12726)."""

    name = "exact"
    aliases = ("em", "exact-match")
    summary = "KL over ids with the same bytes"
    source = "arXiv 2301.12726"
    color, marker = "#56b4e9", "^"

    def build_map(self, pair: TokenizerPair) -> VocabMap:
        return pair.exact_map()
