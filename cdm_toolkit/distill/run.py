"""One distillation run, from settings to a student on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from cdm_toolkit.artifacts.maps import load_or_build_neighbours
from cdm_toolkit.artifacts.receipts import receipt
from cdm_toolkit.distill.collate import Collator
from cdm_toolkit.distill.config import DistillConfig
from cdm_toolkit.distill.data import Features, RowCounts, build_features, side_of
from cdm_toolkit.distill.losses.cdm import CdmSettings, cdm
from cdm_toolkit.distill.losses.record import Method
from cdm_toolkit.distill.losses.sft import sft
from cdm_toolkit.distill.output import claim_output, remove_run
from cdm_toolkit.distill.rows import Row, read_rows
from cdm_toolkit.distill.teacher import OnlineTeacher, RememberingTeacher, Teacher
from cdm_toolkit.distill.trainer import DistillTrainer, StepLog, training_arguments
from cdm_toolkit.errors import BadOption, FileProblem, NothingToTrain
from cdm_toolkit.hub.models import (
    check_vocabulary,
    checked_device,
    load_model,
    model_folder_to_fill,
    save_model,
)
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.vocab_map.contextual import PairTable
from cdm_toolkit.vocab_map.exact import build_exact
from cdm_toolkit.vocab_map.record import Neighbours

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is: align, load, neighbours, train, save. `log` is the latest of training."""

    stage: str
    done: int
    total: int
    log: StepLog | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run has done. `tokens` counts the student's, prompts included and padding not."""

    output: Path
    steps: int
    losses: tuple[StepLog, ...]
    rows: RowCounts
    tokens: int
    train_seconds: float
    seconds: float
    warnings: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds


def run(config: DistillConfig, *, on_progress: Callable[[Progress], None] = lambda _: None) -> RunResult:
    """Train a student as `config` says, and write it to `config.output` with its tokenizer and a receipt.

    Settings, output folder and data are checked before a model is loaded. Raises the errors of these, of the
    models, NothingToTrain, NotFinite.
    """
    began = time.perf_counter()
    checked_device(config.device)
    rows = read_rows(config.data)
    output = Path(config.output)
    made = not output.exists()
    checkpoint = claim_output(output, overwrite=config.overwrite, resume=config.resume)
    try:
        return _run(config, rows, output, checkpoint, on_progress, began)
    except (OSError, SafetensorError) as error:  # of a checkpoint: models and data raise their own
        why = getattr(error, "strerror", None) or str(error)
        raise FileProblem(output, f"it cannot be written ({why})", "make room, then --resume") from error
    finally:
        if made and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _run(
    config: DistillConfig,
    rows: list[Row],
    output: Path,
    checkpoint: Path | None,
    on_progress: Callable[[Progress], None],
    began: float,
) -> RunResult:
    from transformers import set_seed

    set_seed(config.seed)
    student_tokenizer = load_tokenizer(config.student)
    teacher_tokenizer = load_tokenizer(config.teacher) if config.teacher and config.uses_teacher else None
    features, counts = build_features(
        rows,
        side_of(student_tokenizer),
        side_of(teacher_tokenizer) if teacher_tokenizer else None,
        aligner=config.aligner,
        max_length=config.max_length,
        on_row=lambda done: on_progress(Progress("align", done, len(rows))),
    )
    if not features:
        raise NothingToTrain(config.data, str(counts))

    models = 2 if teacher_tokenizer else 1
    on_progress(Progress("load", 0, models))
    student = load_model(config.student, device=config.device)
    _check(student, config.student, student_tokenizer, max(len(row.student_ids) for row in features))
    on_progress(Progress("load", 1, models))
    method: Method = sft
    teacher: Teacher | None = None
    if teacher_tokenizer:
        teacher = _teacher(config, teacher_tokenizer, features)
        on_progress(Progress("load", 2, models))
        method = _cdm(config, student_tokenizer, teacher_tokenizer, on_progress)

    if config.overwrite:
        remove_run(output)
    trainer = DistillTrainer(
        student,
        training_arguments(config),
        features,
        Collator(config.positions),
        student_tokenizer.tokenizer,
        method=method,
        alpha=config.alpha if config.uses_teacher else 1.0,
        teacher=teacher,
        on_step=lambda done, total, log: on_progress(Progress("train", done, total, log)),
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    ended = time.perf_counter()
    result = RunResult(
        output=output,
        steps=trainer.state.global_step,
        losses=tuple(trainer.history),
        rows=counts,
        tokens=sum(log.tokens for log in trainer.history),
        train_seconds=ended - started,
        seconds=ended - began,
        warnings=tuple(_warnings(counts, student_tokenizer, teacher_tokenizer)),
    )
    on_progress(Progress("save", 0, 1))
    _write(trainer, student_tokenizer, _receipt(config, result, student_tokenizer, teacher_tokenizer), output)
    on_progress(Progress("save", 1, 1))
    return result


def _write(trainer: DistillTrainer, tokenizer: Loaded, facts: dict[str, Any], output: Path) -> None:
    """Write the student, its tokenizer and the receipt."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    student.config.use_cache = True  # the Trainer turns it off
    with model_folder_to_fill(output) as folder:
        save_model(student, tokenizer, folder)
        (folder / "receipt.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _warnings(counts: RowCounts, student: Loaded, teacher: Loaded | None) -> Iterator[str]:
    if teacher and teacher.view.fingerprint == student.view.fingerprint:
        yield "teacher and student have the same tokenizer: plain KL would do, without alignment and mapping"
    if counts.unaligned:
        yield f"{counts.unaligned} of {counts.trained} rows could not be aligned; they train by CE alone"
    if counts.cut:
        yield f"{counts.cut} of {counts.trained} rows were cut to the maximum length"
    if counts.empty or counts.too_long:
        yield f"of {counts.read} rows {counts.empty} empty and {counts.too_long} too long ones were left out"


def _check(model: PreTrainedModel, name: str, tokenizer: Loaded, longest: int) -> None:
    """See that a model has a row for each id, and a position for each token."""
    check_vocabulary(model, name, tokenizer.view.vocab_size)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise BadOption("max_length", longest, f"at most {positions}: {name} has no more positions")


def _comes_again(config: DistillConfig, rows: int) -> bool:
    """Say whether any row is seen twice."""
    if config.max_steps is None:
        return config.epochs > 1
    return config.max_steps * config.batch_size * config.grad_accumulation > rows


def _teacher(config: DistillConfig, tokenizer: Loaded, features: list[Features]) -> Teacher:
    assert config.teacher is not None
    model = load_model(config.teacher, device=config.device, dtype=config.teacher_dtype)
    _check(model, config.teacher, tokenizer, max(len(row.teacher_ids) for row in features))
    teacher = OnlineTeacher(model, vocab_t=tokenizer.view.vocab_size, k=config.top_k)
    if _comes_again(config, len(features)):
        return RememberingTeacher(teacher, room=config.teacher_memory << 20)
    return teacher


def _cdm(
    config: DistillConfig, student: Loaded, teacher: Loaded, on_progress: Callable[[Progress], None]
) -> Method:
    """Build the tables of a pair of tokenizers, and bind them to the loss."""
    smaller = min(student.view.vocab_size, teacher.view.vocab_size)
    if config.top_k > smaller:
        raise BadOption("top_k", config.top_k, f"at most {smaller}: the smaller vocabulary has no more ids")
    exact = build_exact(teacher.view, student.view)
    near = load_or_build_neighbours(
        teacher.view,
        student.view,
        theta=config.theta,
        guards=config.guards,
        workers=config.workers,
        progress=lambda done, total: on_progress(Progress("neighbours", done, total)),
    )
    if not config.both_directions:
        none = np.zeros(0, np.int32)
        empty = Neighbours(np.zeros(near.size_s + 1, np.int64), none, none.astype(np.float32), none)
        near = replace(near, s_to_t=empty)
    settings = CdmSettings(
        table=PairTable.from_tables(exact, near).to(config.device),
        exact=torch.from_numpy(exact.dense()).to(config.device) if config.exact_always else None,
        vocab_s=student.view.vocab_size,
        top_k=config.top_k,
        temperature=config.temperature,
        rest_bucket=config.rest_bucket,
    )
    return partial(cdm, settings=settings)


def _receipt(
    config: DistillConfig, result: RunResult, student: Loaded, teacher: Loaded | None
) -> dict[str, Any]:
    """Say what made the student, and of what."""
    named = {"student": student, "teacher": teacher}
    fingerprints = {f"{side} tokenizer": loaded.view.fingerprint for side, loaded in named.items() if loaded}
    made_by = receipt(fingerprints=fingerprints, seed=config.seed, device=config.device)
    figures = {"steps": result.steps, "tokens": result.tokens, "seconds": round(result.seconds, 1)}
    return {
        **made_by,
        "config": asdict(config),
        "rows": asdict(result.rows),
        "losses": [asdict(log) for log in result.losses],
        "warnings": list(result.warnings),
        **figures,
    }
