"""KL(teacher ‖ student) for one tokenizer (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from cdm_toolkit.kd.divergences import kl
from cdm_toolkit.kd.same_vocab import SameVocab


class KL(SameVocab):
    """T² KL(teacher ‖ student) over the teacher's top k and the rest (Hinton et al., arXiv 1503.02531)."""

    name = "kl"
    summary = "KL(teacher ‖ student) for one tokenizer"
    source = "arXiv 1503.02531"

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        return kl(teacher, student)
