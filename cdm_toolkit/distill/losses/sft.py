"""Supervised fine-tuning: the baseline that sees no teacher."""

from __future__ import annotations

import torch

from cdm_toolkit.distill.losses.pick import log_probs, log_sum_exp
from cdm_toolkit.distill.losses.record import Gathered, LossParts


def sft(inputs: Gathered) -> LossParts:
    """Sum the cross-entropy: CE = -Σ log p_student(label)."""
    logits, labels = inputs.student_logits, inputs.labels
    rows = torch.arange(len(labels), device=labels.device)
    ce = -log_probs(logits, log_sum_exp(logits.detach()), rows, labels).sum()
    nothing = torch.zeros_like(ce)
    return LossParts(ce=ce, kd=nothing, matched_mass=nothing, pairs=nothing)
