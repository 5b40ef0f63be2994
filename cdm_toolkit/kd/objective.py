"""What is minimised: cross-entropy and the KD of one teacher or several, weighted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cdm_toolkit.errors import BadOption
from cdm_toolkit.kd.batch import AlignedBatch
from cdm_toolkit.kd.loss_sums import LossInputs, loss_sums
from cdm_toolkit.kd.method import Method
from cdm_toolkit.kd.types import LossSums, TeacherSignal


def weighted_loss(
    sums: LossSums,
    *,
    alpha: float,
    weights: Sequence[float],
    labels: Tensor | float,
    groups: Sequence[Tensor | float],
) -> Float[Tensor, ""]:
    """Combine the sums of a batch: alpha CE / labels + (1 − alpha) Σ weight KD / groups, over teachers.

    `labels` and `groups` count the labels and each teacher's groups of the *whole* optimizer step, all its
    batches and processes: the losses of the parts of a step then add up to the loss of the step. A group
    without a pair counts: how many pairs a group has is known only after the forward pass.
    """
    loss = alpha * _mean(sums.ce, labels)
    for weight, kd, count in zip(weights, sums.kd, groups, strict=True):
        loss = loss + (1 - alpha) * weight * _mean(kd.kd, count)
    return loss


def _mean(total: Tensor, count: Tensor | float) -> Tensor:
    # a count that is a number stays on the host: as a tensor it would be a copy that waits for the device
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


@dataclass(frozen=True, slots=True, eq=False)
class ObjectiveOutput:
    """`loss` is what to minimise; `ce` and each teacher's `kd` are the means that it is made of."""

    loss: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    kd: tuple[Float[Tensor, ""], ...]
    sums: LossSums


class Objective(nn.Module):
    """Cross-entropy and the methods of several teachers, in one pass over the student's logits.

    loss = alpha CE + (1 − alpha) Σ weight KD, over teachers. The batch comes from `kd.collate` with the pairs of
    the methods, in their order.
    """

    def __init__(
        self,
        methods: Sequence[Method[Any, Any]],
        *,
        alpha: float = 0.8,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Weigh each teacher by 1 unless `weights` are given. BadOption for an alpha outside 0 to 1."""
        super().__init__()
        if not 0 <= alpha <= 1:
            raise BadOption("alpha", alpha, "a number from 0 to 1")
        self.alpha = alpha
        self.methods = nn.ModuleList(methods)
        self.weights = [1.0] * len(methods) if weights is None else list(weights)
        if len(self.weights) != len(self.methods):
            raise BadOption("weights", self.weights, f"one for each of {len(self.methods)} methods")

    def signals(self, teachers: Sequence[Any], batch: AlignedBatch) -> list[TeacherSignal | None]:
        """Ask each teacher about its side of the batch; None where the batch has no group for it."""
        self._check_number("teachers", len(teachers))
        self._check_number("teachers in the batch", len(batch.teachers))
        return [
            None if side.empty else method.signal(teacher, batch.of_teacher(nth))
            for nth, (method, teacher, side) in enumerate(
                zip(self._methods(), teachers, batch.teachers, strict=True)
            )
        ]

    def forward(
        self, logits: Tensor, signals: Sequence[TeacherSignal | None], batch: AlignedBatch
    ) -> ObjectiveOutput:
        """Compute the objective; `logits` are whole or at the labels, as a single method takes them.

        Raises what the methods raise for batches, logits and signals that do not fit.
        """
        self._check_number("signals", len(signals))
        self._check_number("teachers in the batch", len(batch.teachers))
        vocab = None
        for nth, (method, signal) in enumerate(zip(self._methods(), signals, strict=True)):
            method.check(batch.of_teacher(nth), signal)
            vocab = method.pair.vocab_s
        at_labels = batch.at_labels(logits, vocab=vocab)
        inputs = [
            None if signal is None else LossInputs.of(method, signal, batch, side)
            for method, signal, side in zip(self._methods(), signals, batch.teachers, strict=True)
        ]
        sums = loss_sums(at_labels, batch.labels, inputs)
        labels, groups = len(batch.labels), [side.groups for side in batch.teachers]
        return ObjectiveOutput(
            loss=weighted_loss(sums, alpha=self.alpha, weights=self.weights, labels=labels, groups=groups),
            ce=sums.ce / max(labels, 1),
            kd=tuple(kd.kd / max(count, 1) for kd, count in zip(sums.kd, groups, strict=True)),
            sums=sums,
        )

    def _check_number(self, what: str, number: int) -> None:
        if number != len(self.methods):
            raise BadOption(f"the number of {what}", number, f"one for each of {len(self.methods)} methods")

    def _methods(self) -> list[Method[Any, Any]]:
        return list(self.methods)  # type: ignore[arg-type]
