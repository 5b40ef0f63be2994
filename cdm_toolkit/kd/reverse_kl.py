"""KL(student ‖ teacher) for one tokenizer (MiniLLM, arXiv 2306.08543)."""

from __future__ import annotations

from torch import Tensor

from cdm_toolkit.kd.divergences import kl
from cdm_toolkit.kd.same_vocab import SameVocab


class ReverseKL(SameVocab):
    """T² KL(student ‖ teacher) over the teacher's top k and the rest (Gu et al., arXiv 2306.08543)."""

    name = "reverse-kl"
    summary = "KL(student ‖ teacher) for one tokenizer"
    source = "arXiv 2306.08543"

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        return kl(student, teacher)
