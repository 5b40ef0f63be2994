"""The plan of a run (dry run): rows, steps, tokens, estimated memory, coverage and warnings."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cdm_toolkit.distill.dataset import RowCounts
from cdm_toolkit.distill.prepare import OnProgress, Prepared, Progress, prepare
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.distill.training_arguments import training_arguments

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import nn

    from cdm_toolkit.distill.settings import DistillConfig
    from cdm_toolkit.distill.trainer import DistillTrainer

LOOKED_AT = 100
"""Rows that shares are measured on."""
LOW_MASS = 0.8
"""Matched mass below which a plan warns."""
ACTIVATIONS = 17
"""Numbers that a layer keeps for the backward pass for each token and unit of width (Korthikanti et al.,
arXiv 2205.05198, section 4.1, half of whose 34 bytes; without the attention matrix, which is not kept)."""


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """One teacher's KD and coverage, measured on the first rows with the student as it is."""

    name: str
    method: str
    weight: float
    aligned_share: float
    """Groups for each label."""
    matched_mass: float
    pairs: float
    kd: float


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What the student samples in a run that is on-policy."""

    prompts: int
    """Rows whose prompt leaves room for a sample."""
    per_step: float
    """Samples of a step, in the mean."""
    tokens: int
    """Of a sample, at most."""
    buffer_steps: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it starts. `memory` estimates in bytes what lies in memory at the height of a step."""

    rows: RowCounts
    steps: int
    steps_an_epoch: int
    rows_per_step: int
    tokens_an_epoch: int
    """The student's, prompts included."""
    labels_an_epoch: int
    parameters: int
    trained_parameters: int
    memory: dict[str, int]
    looked_at: int
    ce: float
    """Nats per label over the rows that were measured."""
    teachers: tuple[TeacherPlan, ...]
    warnings: tuple[str, ...]
    held_out: int = 0
    """Rows that are evaluated."""
    evaluations: int = 0
    sampling: SamplingPlan | None = None


def plan(config: DistillConfig, *, on_progress: OnProgress = lambda _: None) -> Plan:
    """Resolve all that a run needs, and look at its first rows; nothing is trained and nothing is written.

    Raises what `run` raises before its first step.
    """
    _ = config.train.torch_device  # a device that is not here is told before anything is read
    rows = Rows(config.sources, config.train.seed)
    prepared = prepare(config, rows, on_progress, keep_answers=False)
    with prepared.opened, tempfile.TemporaryDirectory(prefix="cdm-plan-") as folder:
        trainer = prepared.trainer(training_arguments(config, Path(folder)))
        ce, teachers, looked_at = _look(prepared, trainer, on_progress)
    epoch, batches = _epoch(trainer)
    batches_per_step = config.train.grad_accumulation * trainer.args.world_size
    steps_an_epoch = math.ceil(batches / batches_per_step)
    steps = config.train.max_steps or math.ceil(config.train.epochs * steps_an_epoch)
    lengths, labels = prepared.features.student_lengths[epoch], prepared.features.label_counts[epoch]
    trained = [p for p in prepared.student.parameters() if p.requires_grad]
    rows_per_step = (
        round(len(epoch) / batches * batches_per_step)
        if config.train.batch_tokens
        else config.train.batch_size * batches_per_step
    )
    return Plan(
        rows=prepared.counts,
        steps=steps,
        steps_an_epoch=steps_an_epoch,
        rows_per_step=rows_per_step,
        tokens_an_epoch=int(lengths.sum()),
        labels_an_epoch=int(labels.sum()),
        parameters=sum(p.numel() for p in prepared.student.parameters()),
        trained_parameters=sum(p.numel() for p in trained),
        memory=dict(_memory(prepared)),
        looked_at=looked_at,
        ce=ce,
        teachers=teachers,
        warnings=(*prepared.warnings, *_low(teachers)),
        held_out=len(prepared.heldout.features) if prepared.heldout else 0,
        evaluations=math.ceil(steps / config.eval.every) if config.eval else 0,
        sampling=_sampling(prepared, rows_per_step),
    )


def _sampling(prepared: Prepared, rows_per_step: int) -> SamplingPlan | None:
    on_policy = prepared.on_policy
    if on_policy is None:
        return None
    settings, prompts = on_policy.settings, len(on_policy.prompts)
    return SamplingPlan(
        prompts=prompts,
        per_step=settings.share * rows_per_step * prompts / len(prepared.features),
        tokens=max(on_policy.room(prompt) for prompt in on_policy.prompts.values()),
        buffer_steps=settings.buffer_steps,
    )


def _epoch(trainer: DistillTrainer) -> tuple[Int64[np.ndarray, " _"], int]:
    """Give the rows of the first epoch, and the number of batches that they make."""
    if trainer.batch_tokens is not None:
        batches = list(trainer.token_batch_sampler(trainer.batch_tokens))
        return np.concatenate(batches), len(batches)
    epoch = np.array(list(trainer.epoch_sampler()))
    return epoch, math.ceil(len(epoch) / trainer.args.train_batch_size)


def _look(
    prepared: Prepared, trainer: DistillTrainer, on_progress: OnProgress
) -> tuple[float, tuple[TeacherPlan, ...], int]:
    """Run both models over the first rows, without a gradient."""
    import torch

    many, size = min(LOOKED_AT, len(prepared.features)), prepared.config.train.batch_size
    device = torch.device(prepared.config.train.torch_device)
    model = prepared.student.to(device).eval()
    sums, labels = np.zeros((len(prepared.objectives), 4)), 0
    ce = 0.0
    for first in range(0, many, size):
        features = [prepared.features[nth] for nth in range(first, min(first + size, many))]
        batch = prepared.collator(features).to(device)
        with torch.no_grad():
            found = trainer.loss_sums(model, batch)
        ce, labels = ce + float(found.ce), labels + len(batch.labels)
        for nth, (kd, side) in enumerate(zip(found.kd, batch.teachers, strict=True)):
            sums[nth] += [float(kd.kd), float(kd.matched_mass), float(kd.pairs), side.groups]
        on_progress(Progress("look", first + len(features), many))
    teachers = tuple(
        TeacherPlan(
            name=teacher.model,
            method=teacher.method,
            weight=teacher.weight,
            aligned_share=groups / labels,
            matched_mass=mass / max(groups, 1),
            pairs=pairs / max(groups, 1),
            kd=kd / max(groups, 1),
        )
        for teacher, (kd, mass, pairs, groups) in zip(prepared.config.teachers, sums.tolist(), strict=True)
    )
    return ce / labels, teachers, many


def _low(teachers: tuple[TeacherPlan, ...]) -> Iterator[str]:
    for teacher in teachers:
        if teacher.aligned_share == 0:
            yield f"nothing is aligned with {teacher.name}: it teaches nothing"
        elif 0 < teacher.matched_mass < LOW_MASS:
            yield (
                f"only {teacher.matched_mass:.0%} of what {teacher.name} predicts has a match in the student's "
                "vocabulary: the rest teaches little"
            )


def _memory(prepared: Prepared) -> Iterator[tuple[str, int]]:
    """Estimate the memory of a step on the longest rows, part by part, in bytes."""
    config, student = prepared.config, prepared.student
    mixed = 2 if config.train.mixed_dtype == "bfloat16" else 4
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    yield "student weights", _bytes(student)
    wide = 2 if config.train.weights == "bfloat16" else 4
    yield "gradients", wide * trained
    yield "optimizer (AdamW)", 2 * wide * trained
    lengths, labels = prepared.features.student_lengths, prepared.features.label_counts
    many = config.train.batch_size
    if config.train.batch_tokens:
        many = max(1, config.train.batch_tokens // int(lengths.max()))
    if (on_policy := prepared.on_policy) is not None and on_policy.settings.share > 0:
        prompts = on_policy.prompts.values()  # a sample may be longer than the rows
        new = np.array([on_policy.room(prompt) for prompt in prompts])
        whole = new + [len(prompt.ids) for prompt in prompts]
        lengths, labels = np.append(lengths, whole), np.append(labels, new)
    longest, labels = np.sort(lengths)[-many:], np.sort(labels)[-many:]
    shape, tokens = student.config, int(longest.max()) * len(longest)
    kept = 1 if config.train.gradient_checkpointing else ACTIVATIONS
    yield "student activations", kept * mixed * tokens * shape.hidden_size * shape.num_hidden_layers
    yield "student logits and their gradient", 2 * mixed * int(labels.sum()) * shape.vocab_size
    teachers = zip(config.teachers, prepared.objectives, prepared.teacher_tokenizers, strict=True)
    for teacher, objective, tokenizer in teachers:
        model = getattr(objective.teacher, "model", None)
        if model is not None:
            elsewhere = teacher.device or (teacher.device_map and "several devices")
            name = f"teacher {objective.name}" + (f" on {elsewhere}" if elsewhere else "")
            yield f"{name}, weights", _bytes(model)
            logits = int(labels.sum()) * tokenizer.view.vocab_size * model.dtype.itemsize
            yield f"{name}, logits", logits


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
