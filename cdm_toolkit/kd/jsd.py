"""Generalised JSD for one tokenizer (GKD, arXiv 2306.13649, equation 1)."""

from __future__ import annotations

from torch import Tensor

from cdm_toolkit.kd.divergences import generalised_jsd
from cdm_toolkit.kd.same_vocab import JSDSettings, SameVocab


class JSD(SameVocab):
    """T² JSD_β over the teacher's top k and the rest (Agarwal et al., arXiv 2306.13649, eq. 1; there without T²)."""

    name = "jsd"
    summary = "generalised JSD for one tokenizer"
    source = "arXiv 2306.13649, equation 1"
    Settings = JSDSettings

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        settings: JSDSettings = self.settings  # type: ignore[assignment]
        return generalised_jsd(teacher, student, settings.beta)
