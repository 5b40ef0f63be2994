"""Prefix: KL over the first student token of each teacher token's bytes."""

from __future__ import annotations

from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.static_map import StaticMap
from cdm_toolkit.vocab_map.types import VocabMap


class Prefix(StaticMap):
    """T² KL(teacher ‖ student) over the longest student token that begins each teacher token, and the rest."""

    name = "prefix"
    summary = "KL over the first student token of each teacher token's bytes"
    source = "a baseline of this toolkit"
    color, marker = "#b20030", "<"

    def build_map(self, pair: TokenizerPair) -> VocabMap:
        return pair.prefix_map()
