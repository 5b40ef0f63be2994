"""All that a run needs before its first step: rows as features, models, methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cdm_toolkit.distill.collate import Collator, TeacherLayout
from cdm_toolkit.distill.data import RowCounts, TeacherSide, build_features, side_of, template_notes
from cdm_toolkit.distill.entropies import ModelEntropies
from cdm_toolkit.distill.lessons import Rows, build_lesson
from cdm_toolkit.distill.losses.methods import METHODS
from cdm_toolkit.distill.rows import Row
from cdm_toolkit.distill.trainer import DistillTrainer, Lesson, StepLog
from cdm_toolkit.errors import BadOption, MissingExtra, NothingToTrain
from cdm_toolkit.hub.models import (
    check_positions,
    check_vocabulary,
    load_model,
    model_fingerprint,
    model_folder,
)
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int64
    from transformers import PreTrainedModel, TrainingArguments

    from cdm_toolkit.distill.config import DistillConfig, TeacherConfig
    from cdm_toolkit.distill.data import StoredFeatures


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is: load, entropies, align, neighbours, train, save. `log` is the latest of training."""

    stage: str
    done: int
    total: int
    log: StepLog | None = None


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A run before its first step."""

    config: DistillConfig
    student: PreTrainedModel
    student_tokenizer: Loaded
    teacher_tokenizers: tuple[Loaded, ...]
    features: StoredFeatures
    counts: RowCounts
    collator: Collator
    lessons: tuple[Lesson, ...]
    warnings: tuple[str, ...]

    def trainer(
        self,
        arguments: TrainingArguments,
        *,
        on_step: Callable[[int, int, StepLog | None], None] = lambda *_: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> DistillTrainer:
        return DistillTrainer(
            self.student,
            arguments,
            self.features,
            self.collator,
            self.student_tokenizer.tokenizer,
            vocab_s=self.student_tokenizer.view.vocab_size,
            lessons=self.lessons,
            alpha=self.config.ce_weight,
            bucket=self.config.train.bucket,
            on_step=on_step,
            stopping=stopping,
        )


def prepare(config: DistillConfig, rows: list[Row], on_progress: OnProgress) -> Prepared:
    """Tokenize, align and load. Raises the errors of models and tokenizers, NothingToTrain, BadOption."""
    student_tokenizer = load_tokenizer(config.student)
    tokenizers = tuple(load_tokenizer(teacher.model) for teacher in config.teachers)
    for teacher, tokenizer in zip(config.teachers, tokenizers, strict=True):
        _check_method(teacher, tokenizer, student_tokenizer)
    models = _Models(config, on_progress)
    sides = [
        TeacherSide(side_of(tokenizer), teacher.aligner)
        for teacher, tokenizer in zip(config.teachers, tokenizers, strict=True)
    ]
    features, counts = build_features(
        rows,
        side_of(student_tokenizer),
        sides,
        max_length=config.data.max_length,
        template=config.data.template,
        workers=config.data.workers,
        entropies=models.entropies(len(rows)),
        on_row=lambda done: on_progress(Progress("align", done, len(rows))),
    )
    if not len(features):
        raise NothingToTrain(config.data.path, str(counts))
    student = models.student
    _check(student, config.student, student_tokenizer, features.student_lengths)
    lessons = tuple(
        build_lesson(
            teacher,
            tokenizer,
            student_tokenizer,
            Rows(nth, features, rows, config.data.template),
            model=partial(_teacher, models, nth, tokenizer, features),
            device=config.train.device,
            workers=config.data.workers,
            progress=lambda done, total: on_progress(Progress("neighbours", done, total)),
        )
        for nth, (teacher, tokenizer) in enumerate(zip(config.teachers, tokenizers, strict=True))
    )
    layouts = tuple(
        TeacherLayout(
            teacher.positions,
            tokens=METHODS[teacher.variant].needs_tokens,
            student_tokens=METHODS[teacher.variant].needs_student_tokens,
        )
        for teacher in config.teachers
    )
    return Prepared(
        config=config,
        student=_adapted(student, config),
        student_tokenizer=student_tokenizer,
        teacher_tokenizers=tokenizers,
        features=features,
        counts=counts,
        collator=Collator(layouts),
        lessons=lessons,
        warnings=(
            *_warnings(config, counts, student_tokenizer, tokenizers),
            *template_notes(side_of(student_tokenizer), sides, config.data.template),
        ),
    )


class _Models:
    """Load each model once, when it is first needed."""

    def __init__(self, config: DistillConfig, on_progress: OnProgress) -> None:
        self.config, self.on_progress = config, on_progress
        self._student: PreTrainedModel | None = None
        self._teachers: dict[int, PreTrainedModel] = {}
        self._many = 1 + sum(teacher.cache is None for teacher in config.teachers)

    @property
    def student(self) -> PreTrainedModel:
        if self._student is None:
            self._student = load_model(self.config.student, device=self.config.train.device)
            self._tell()
        return self._student

    def teacher(self, nth: int) -> PreTrainedModel:
        if nth not in self._teachers:
            teacher = self.config.teachers[nth]
            self._teachers[nth] = load_model(
                teacher.model, device=self.config.train.device, dtype=teacher.dtype
            )
            self._tell()
        return self._teachers[nth]

    def entropies(self, rows: int) -> ModelEntropies | None:
        """Weigh tokens by what the models predict before training, where a teacher asks for it."""
        teachers = self.config.teachers
        asking = [nth for nth, teacher in enumerate(teachers) if teacher.entropy == "models"]
        if not asking:
            return None
        models: dict[int, Callable[[], PreTrainedModel]] = {0: lambda: self.student}
        models |= {nth + 1: partial(self.teacher, nth) for nth in asking}
        names = [self.config.student, *(teachers[nth].model for nth in asking)]
        total, done = rows * len(models), 0

        def tell(some: int) -> None:
            nonlocal done
            done = min(done + some, total)
            self.on_progress(Progress("entropies", done, total))

        fingerprint = " ".join(model_fingerprint(model_folder(name)) for name in names)
        return ModelEntropies(models, fingerprint, tell)

    def _tell(self) -> None:
        done = len(self._teachers) + (self._student is not None)
        self.on_progress(Progress("load", done, max(self._many, done)))


def _check_method(teacher: TeacherConfig, tokenizer: Loaded, student: Loaded) -> None:
    """See that a method for one tokenizer gets one, and that no vocabulary is smaller than the candidates."""
    if METHODS[teacher.method].same_tokenizer and tokenizer.view.fingerprint != student.view.fingerprint:
        raise BadOption(
            f"the method of {teacher.model}",
            teacher.method,
            f"one for different tokenizers, such as cdm: {tokenizer.view.name} is not {student.view.name}",
        )
    smaller = min(student.view.vocab_size, tokenizer.view.vocab_size)
    if teacher.top_k is not None and teacher.top_k > smaller and METHODS[teacher.variant].needs_top_k:
        raise BadOption("top_k", teacher.top_k, f"at most {smaller}: the smaller vocabulary has no more ids")


def _check(model: PreTrainedModel, name: str, tokenizer: Loaded, lengths: Int64[np.ndarray, " row"]) -> None:
    """See that a model has a row for each id, and a position for each token."""
    check_vocabulary(model, name, tokenizer.view.vocab_size)
    check_positions(model, name, int(lengths.max()), option="max_length")


def _teacher(models: _Models, nth: int, tokenizer: Loaded, features: StoredFeatures) -> PreTrainedModel:
    """Load a teacher that can read its side of the rows."""
    model = models.teacher(nth)
    _check(model, models.config.teachers[nth].model, tokenizer, features.teacher_lengths[nth])
    return model


def _adapted(student: PreTrainedModel, config: DistillConfig) -> Any:
    """Put adapters in, and compile the layers, where the run asks for it."""
    train, model = config.train, student
    if train.compile:
        for layer in _layers(student):
            layer.compile()
    if train.lora is None:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtra("peft", "train", "training adapters") from None
    if train.gradient_checkpointing:
        model.enable_input_require_grads()
    targets = train.lora.targets
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=train.lora.rank,
        lora_alpha=train.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=train.lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    try:
        return get_peft_model(model, adapters)
    except ValueError as error:
        raise BadOption(
            "train.lora.targets", targets, f"names of modules of {config.student}: {error}"
        ) from None


def _layers(model: PreTrainedModel) -> Iterator[Any]:
    """Find the repeated blocks of a model: the modules of its longest list."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    yield from max(lists, key=len, default=nn.ModuleList())


def _warnings(
    config: DistillConfig, counts: RowCounts, student: Loaded, teachers: tuple[Loaded, ...]
) -> Iterator[str]:
    for teacher, tokenizer in zip(config.teachers, teachers, strict=True):
        if (
            tokenizer.view.fingerprint == student.view.fingerprint
            and not METHODS[teacher.method].same_tokenizer
        ):
            yield f"{teacher.model} and the student have the same tokenizer: kl would do, without a mapping"
    if counts.unaligned:
        yield f"{counts.unaligned} of {counts.trained} rows could not be aligned; they train by CE alone"
    if counts.cut:
        yield f"{counts.cut} of {counts.trained} rows were cut to the maximum length"
    if counts.empty or counts.too_long:
        yield f"of {counts.read} rows {counts.empty} empty and {counts.too_long} too long ones were left out"
