"""MinED: KL over a fixed map of least edit distance (FuseLLM, arXiv 2401.10491)."""

from __future__ import annotations

from dataclasses import dataclass

from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.settings import setting
from cdm_toolkit.kd.static_map import StaticMap, StaticMapSettings
from cdm_toolkit.vocab_map.types import VocabMap


@dataclass(frozen=True, slots=True, kw_only=True)
class MinEDSettings(StaticMapSettings):
    """Settings of `MinED`."""

    match_digits: bool = setting(True, "Never pair tokens whose digits or operators differ.")


class MinED(StaticMap):
    """T² KL(teacher ‖ student) over the map of least edit distance, and the rest (FuseLLM, arXiv 2401.10491)."""

    name = "min-ed"
    aliases = ("mined",)
    summary = "KL over a fixed map of least edit distance"
    source = "arXiv 2401.10491"
    color, marker = "#e69f00", "v"
    Settings = MinEDSettings

    def build_map(self, pair: TokenizerPair) -> VocabMap:
        settings: MinEDSettings = self.settings  # type: ignore[assignment]
        return pair.min_ed_map(match_digits=settings.match_digits)
