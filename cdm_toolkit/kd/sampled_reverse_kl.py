"""Reverse KL at the tokens that the student has sampled, of which no candidates are needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import huber_loss

from cdm_toolkit.kd.divergences import NOTHING
from cdm_toolkit.kd.group_likelihoods import every_token, log_likelihoods
from cdm_toolkit.kd.method import Method
from cdm_toolkit.kd.settings import MethodSettings, setting
from cdm_toolkit.kd.types import KDSums, LogprobRequest, StudentLogits, TeacherSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledReverseKLSettings(MethodSettings):
    """Settings of `SampledReverseKL`."""

    clip: float = setting(
        20.0, "Difference of log-likelihoods, in nats, beyond which a group teaches no more.", above=0
    )


class SampledReverseKL(Method[SampledReverseKLSettings, Tensor]):
    """½ (log q − log p)² of each group, which the student has sampled.

    p and q are the likelihoods that teacher and student give the group's text: the products of the probabilities of its
    tokens, each given all before it. The gradient is (log q − log p) ∇ log q; its mean over samples of the student is
    the gradient of KL(student ‖ teacher) (the estimator k₂ of Schulman 2020, "Approximating KL divergence"), as the
    policy gradient of on-policy distillation with the reward log p − log q of each token (Lu et al., Thinking Machines,
    2025). Beyond `clip` the loss is linear (Huber). On text of others it has no such meaning.

    Needs no mapping, and of a teacher one number a token: what is sent and kept is least.

    `matched_mass` is the teacher's likelihood of the groups' texts, `pairs` counts the groups.
    """

    name = "sampled-reverse-kl"
    summary = "reverse KL at the tokens that the student has sampled, without a map"
    source = "Schulman 2020; Thinking Machines 2025"
    Settings = SampledReverseKLSettings
    color, marker = "#00798c", "h"
    reads_teacher_tokens = True
    reads_student_tokens = True
    samples_alone = True

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[Tensor]:
        return every_token(student)

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[Tensor], signal: TeacherSignal
    ) -> KDSums:
        of_teacher, of_student = (
            each.clamp(min=NOTHING) for each in log_likelihoods(logprobs, request, signal)
        )
        return KDSums(
            kd=huber_loss(of_student, of_teacher, delta=self.settings.clip, reduction="sum"),
            matched_mass=of_teacher.exp().sum(),
            pairs=torch.ones_like(of_student).sum(),
        )
