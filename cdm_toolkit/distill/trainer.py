"""`transformers.Trainer` with the distillation objective of `kd`."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import Float64
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from cdm_toolkit.distill.generate import NotFiniteLogits
from cdm_toolkit.distill.logs import (
    EvalLog,
    SampleLog,
    StepLog,
    StepSeconds,
    TeacherLog,
    read_evaluations,
    read_history,
    write_logs,
)
from cdm_toolkit.distill.on_policy import (
    Drawn,
    OnPolicy,
    Sample,
    SampleLogprobs,
    add_samples,
    keep_samples_until,
    read_pending,
    sample_log,
    write_pending,
)
from cdm_toolkit.distill.output_folder import check_seal, last_checkpoint, seal_checkpoint
from cdm_toolkit.distill.sampler import LengthGroupedSampler, TokenBatchSampler
from cdm_toolkit.distill.sharding import shard_frozen
from cdm_toolkit.distill.step_times import StepTimes
from cdm_toolkit.errors import BadArtifact, NotFinite, ServerProblem
from cdm_toolkit.forward import as_it_was, logits_at
from cdm_toolkit.kd.batch import AlignedBatch, Collator
from cdm_toolkit.kd.loss_sums import LossInputs, loss_sums
from cdm_toolkit.kd.method import Method, Teacher
from cdm_toolkit.kd.objective import weighted_loss
from cdm_toolkit.kd.types import LossSums
from cdm_toolkit.teachers.local import Local
from cdm_toolkit.teachers.served import Served, Stopped

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdm_toolkit.distill.dataset_store import AlignedDataset
    from cdm_toolkit.distill.heldout import SomeRows, Spelled
    from cdm_toolkit.distill.settings import EvalConfig
    from cdm_toolkit.distill.vllm_server import VLLMServer
    from cdm_toolkit.kd.aligned_rows import AlignedRow


LOST = "start the run without `resume`, or go on without `eval`: these are its best weights so far"
"""What to do where the checkpoint of the best evaluation is damaged or gone."""


@dataclass(frozen=True, slots=True, eq=False)
class TeacherObjective:
    """One teacher's part of the objective: where its signal comes from, the method on it, and its weight.

    `heldout` is who is asked about held-out rows, and `sampled` about what the student samples; None where nobody knows
    them.
    """

    name: str
    teacher: Teacher
    method: Method[Any, Any]
    weight: float = 1.0
    heldout: Teacher | None = None
    sampled: Teacher | None = None


@dataclass(frozen=True, slots=True, eq=False)
class WeightedBatch:
    """Rows whose cross-entropy has the same weight; a dummy batch is run, and adds nothing to the loss.

    `samples` are those that the rows are of, where the student has sampled them: they have no cross-entropy.
    """

    batch: AlignedBatch
    alpha: float
    is_dummy: bool = False
    samples: tuple[Sample, ...] | None = None

    def to(self, device: Any, non_blocking: bool = False) -> WeightedBatch:
        """Move the tensors to a device."""
        return replace(self, batch=self.batch.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> WeightedBatch:
        """Pin the tensors."""
        return replace(self, batch=self.batch.pin_memory())


class Inputs(TypedDict):
    """What the Trainer hands from the data loader to the loss: it takes mappings only.

    Rows that may be sampled come as `rows`, and are collated when that is done.
    """

    parts: list[WeightedBatch]
    rows: NotRequired[tuple[AlignedRow, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """What is said of each row: how often an epoch has it, and the weight of its cross-entropy.

    `weights` are by the index of the row among those that are trained on, None where each comes once. `alphas` are all
    that there are; `alpha_of` gives those of rows by their numbers in the data.
    """

    alphas: tuple[float, ...]
    alpha_of: Callable[[Sequence[int]], Sequence[float]]
    weights: Float64[np.ndarray, " row"] | None = None

    @classmethod
    def of_one(cls, alpha: float) -> Mixture:
        """Make that of rows of one kind."""
        return cls((alpha,), lambda numbers: [alpha] * len(numbers))


@dataclass(frozen=True, slots=True, eq=False)
class Heldout:
    """Rows to evaluate on, and what is made of the evaluations."""

    features: AlignedDataset | SomeRows
    mixture: Mixture
    spelled: Spelled
    counts: tuple[int, ...]
    """Labels, and groups of each teacher, of all rows."""
    fingerprint: str
    """Of the rows."""
    settings: EvalConfig

    def batches(self, size: int) -> list[list[int]]:
        """Part the rows, those of like length together."""
        order = np.argsort(self.features.lengths, kind="stable").tolist()
        return [order[first : first + size] for first in range(0, len(order), size)]


@dataclass(frozen=True, slots=True)
class _CollatorByAlpha:
    """Collate rows, those of each alpha by themselves, and what the student has sampled.

    Where several processes train together each runs as many batches as the others (`every_alpha`): one without rows of
    an alpha, or without samples, runs a dummy batch.
    """

    collator: Collator
    mixture: Mixture
    every_alpha: bool

    def __call__(
        self,
        rows: Sequence[AlignedRow],
        chosen: Sequence[bool] | None = None,
        samples: Sequence[Sample] = (),
    ) -> Inputs:
        """Collate rows; those that are `chosen` are left to `samples`, which are in their place."""
        alphas = self.mixture.alpha_of([row.row for row in rows])
        left = [False] * len(rows) if chosen is None else chosen
        parts = []
        for alpha in self.mixture.alphas:
            own = [
                row
                for row, its, is_left in zip(rows, alphas, left, strict=True)
                if its == alpha and not is_left
            ]
            if own or self.every_alpha:
                parts.append(WeightedBatch(self.collator(own or rows[:1]), alpha, not own))
        if samples or (self.every_alpha and chosen is not None):
            batch = self.collator([sample.aligned for sample in samples] or rows[:1])
            parts.append(WeightedBatch(batch, 0.0, not samples, tuple(samples)))
        return Inputs(parts=parts)


def _uncollated(rows: Sequence[AlignedRow]) -> Inputs:
    return Inputs(parts=[], rows=tuple(rows))


class DistillTrainer(Trainer):
    """Train a student on the signals of its teachers; everything else is the Trainer's."""

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        student: nn.Module,
        arguments: TrainingArguments,
        features: AlignedDataset | SomeRows,
        collator: Collator,
        tokenizer: Any,
        *,
        objectives: Sequence[TeacherObjective],
        mixture: Mixture,
        heldout: Heldout | None = None,
        group_by_length: bool = True,
        batch_tokens: int | None = None,
        on_policy: OnPolicy | None = None,
        on_step: Callable[[int, int, StepLog | None], None] = lambda *_: None,
        on_evaluation: Callable[[int, int, EvalLog | None], None] = lambda *_: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Give `on_step` the steps done and to do after each, and the latest log; `on_evaluation` the same for batches
        of held-out rows, and what came out at the end.

        When `stopping` gives True, the run ends after the step at hand, with a checkpoint.
        """
        collate = _CollatorByAlpha(collator, mixture, arguments.world_size > 1)
        super().__init__(
            model=student,
            args=arguments,
            data_collator=collate if on_policy is None else _uncollated,
            train_dataset=features,
            eval_dataset=heldout and heldout.features,
            processing_class=tokenizer,
            callbacks=[_AfterStep(self._tell, stopping)],
        )
        self.remove_callback(PrinterCallback)
        self.objectives, self.mixture, self.group_by_length = tuple(objectives), mixture, group_by_length
        self._sharded_teachers = self._shard_teachers()
        self.batch_tokens, self.packing = batch_tokens, collator.packing
        self.history: list[StepLog] = []
        self.heldout, self.evaluations = heldout, list[EvalLog]()
        self._collator, self._on_step, self._on_evaluation = collator, on_step, on_evaluation
        self.on_policy, self._by_alpha = on_policy, collate
        self.samples: list[dict[str, Any]] = []
        """Those of the step that was logged last, as they are written down."""
        self._pending: deque[Drawn] = deque()
        self._taken: list[Drawn] = []  # of the step at hand
        self._undrawn = False
        self._logprobs: list[SampleLogprobs] = []
        self._rows, self._drawn = 0, np.zeros(2)  # since the log before; of what was drawn tokens and seconds
        self._sums = self._no_sums()
        self._unseen: list[tuple[int, tuple[int, ...], Tensor]] = []
        self._times = StepTimes(self.args.device)
        self._epoch: Iterator[Inputs] | None = None
        self._batches: Iterator[Inputs] = iter(())
        self.stopped_by: Stopped | ServerProblem | None = None
        """Why the run ended before its last step, where a server did not answer."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load batches of rows, or batches of tokens."""
        loader: DataLoader[Any]
        if self.batch_tokens is None:
            loader = super().get_train_dataloader()
            return loader
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.token_batch_sampler(self.batch_tokens),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def token_batch_sampler(self, tokens: int) -> TokenBatchSampler:
        """Make the sampler of batches of so many tokens, of the epoch that the run is in."""
        arguments = self.args
        return TokenBatchSampler(
            self.train_dataset.lengths,
            tokens=tokens,
            packed=self.packing is not None,
            batches_per_step=arguments.gradient_accumulation_steps * arguments.world_size,
            seed=arguments.seed,
            epoch=lambda: int(self.state.epoch or 0),
            weights=self.mixture.weights,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.epoch_sampler()

    def epoch_sampler(self) -> LengthGroupedSampler:
        """Make the sampler, which gives the rows of the epoch that the run is in."""
        arguments = self.args
        return LengthGroupedSampler(
            self.train_dataset.lengths,
            rows_per_step=arguments.train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size,
            seed=arguments.seed,
            group_by_length=self.group_by_length,
            epoch=lambda: int(self.state.epoch or 0),
            weights=self.mixture.weights,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], Tensor]:
        """Take the batches of one optimizer step, and count its labels and groups over all processes."""
        self._times.begin("data")
        if epoch_iterator is not self._epoch:
            self._epoch = epoch_iterator
            steps = self.state.max_steps - self.state.global_step
            last = steps * self.args.gradient_accumulation_steps  # of what the run still reads
            batches_of_run = islice(epoch_iterator, last)
            if self.on_policy is not None:
                self._batches = self._with_samples(batches_of_run, self.on_policy)
            else:
                self._batches = asked_ahead(batches_of_run, [each.teacher for each in self.objectives])
        if self.stopped_by is not None:
            return [], torch.zeros(1 + len(self.objectives), device=device)
        self._taken = []
        try:
            batches, _ = super().get_batch_samples(self._batches, num_batches, device)
        except (Stopped, ServerProblem) as problem:  # of the server that samples
            self.stopped_by, self._undrawn, batches = problem, True, []
        if not self._answered(batches):
            return [], torch.zeros(1 + len(self.objectives), device=device)
        counts = torch.tensor(
            [_counts(part) for inputs in batches for part in inputs["parts"] if not part.is_dummy],
            device=device,
        ).sum(0)
        return batches, self._over_processes(counts)

    def _answered(self, batches: Sequence[Inputs]) -> bool:
        """Wait for the servers that teachers are behind; where one fails, or the run is told to stop, end it here.

        It is then between two steps, in all processes: its checkpoint is one like any other.
        """
        if self._sampling_server is None and not any(
            isinstance(each.teacher, Served) for each in self.objectives
        ):
            return True
        self._times.begin("teacher")
        try:
            for inputs in batches:
                for part in inputs["parts"]:
                    for nth, teacher in self._served(part):
                        teacher.await_answers(part.batch.of_teacher(nth))
        except (Stopped, ServerProblem) as problem:
            self.stopped_by = problem
        self.stopped_by = self._in_any_process(self.stopped_by)
        if self.stopped_by is None:
            return True
        if self._over_processes(torch.tensor(float(self._undrawn), device=self.args.device)):
            self._pending.clear()  # a run that goes on draws again in all processes
        else:  # the step is not taken: a run that goes on takes it
            self._pending.extendleft(reversed(self._taken))
        # the Trainer would warn of an epoch without a row, where the first step of one is not taken
        logging.getLogger("transformers.trainer").addFilter(lambda record: "single sample" not in record.msg)
        self.control.should_training_stop = True
        self.control.should_log = self.control.should_save = self.state.global_step > 0
        return False

    def _in_any_process(self, problem: Stopped | ServerProblem | None) -> Stopped | ServerProblem | None:
        """Give this process's problem, or word of one that another process has; None where all are well."""
        flags = [float(problem is not None), float(isinstance(problem, ServerProblem))]
        stopped, lost = self._over_processes(torch.tensor(flags, device=self.args.device)).tolist()
        if problem is not None or not stopped:
            return problem
        if not lost:
            return Stopped()
        urls = [
            each.teacher.client.settings.urls[0]
            for each in self.objectives
            if isinstance(each.teacher, Served)
        ]
        url = urls[0] if self._sampling_server is None else self._sampling_server.url
        return ServerProblem(url, "does not serve another process of this run", "see what that one says")

    def _over_processes(self, sums: Tensor) -> Tensor:
        """Sum up over all processes."""
        return self.accelerator.reduce(sums, "sum") if self.args.world_size > 1 else sums

    @property
    def _sampling_server(self) -> VLLMServer | None:
        return None if self.on_policy is None else self.on_policy.server

    def _teachers_of(self, part: WeightedBatch) -> list[Teacher | None]:
        """List who is asked about a batch."""
        if part.samples is not None and not part.is_dummy:
            return [each.sampled for each in self.objectives]
        return [each.teacher for each in self.objectives]

    def _served(self, part: WeightedBatch) -> Iterator[tuple[int, Served]]:
        """Find the servers that are asked about a batch, by the numbers of their teachers."""
        for nth, teacher in enumerate(self._teachers_of(part)):
            if isinstance(teacher, Served) and not part.batch.teachers[nth].empty:
                yield nth, teacher

    def _with_samples(self, batches: Iterator[Inputs], on_policy: OnPolicy) -> Iterator[Inputs]:
        """Give batches with what the student samples, those of `buffer_steps` drawn when the first is asked for."""
        many = on_policy.settings.buffer_steps * self.args.gradient_accumulation_steps
        while together := list(islice(batches, len(self._pending) or many)):
            rows = [inputs["rows"] for inputs in together]
            self._draw(rows, on_policy)
            samples = on_policy.samples(self._pending)
            made = [
                self._by_alpha(of_batch, drawn.chosen, sampled)
                for of_batch, drawn, sampled in zip(rows, self._pending, samples, strict=True)
            ]
            for part in (part for inputs in made for part in inputs["parts"]):
                for nth, teacher in self._served(part):
                    teacher.prefetch(part.batch.of_teacher(nth))
            for inputs in made:
                self._taken.append(self._pending.popleft())
                yield Inputs(parts=[part.to(self.args.device) for part in inputs["parts"]])

    def _draw(self, batches: Sequence[Sequence[AlignedRow]], on_policy: OnPolicy) -> None:
        """See that the samples of batches are there: those of a checkpoint, or new ones. NotFinite, BadArtifact."""
        numbers = [tuple(row.row for row in rows) for rows in batches]
        if self._pending:
            if [drawn.rows for drawn in self._pending] != numbers:
                checkpoint = self._checkpoint(self.state.global_step)
                fix = "go on with the data and settings that it had, or start the run without `resume`"
                raise BadArtifact(checkpoint, "its samples are of other rows", fix)
            return
        self._times.begin("sampling")
        began, student = perf_counter(), _unwrapped(self.accelerator.unwrap_model(self.model_wrapped))
        step, process, processes = self.state.global_step, self.args.process_index, self.args.world_size
        if on_policy.server is not None and on_policy.settings.share > 0:
            self._update_weights(on_policy.server, student)
        try:
            with self.accelerator.autocast():
                self._pending.extend(on_policy.draw(student, numbers, step, process, processes))
        except NotFiniteLogits:
            raise NotFinite("what the student samples from", step + 1, self._last_good()) from None
        self._times.begin("data")
        tokens = sum(len(ids) for drawn in self._pending for _, ids in drawn.samples)
        self._drawn += np.array([tokens, perf_counter() - began])

    def _update_weights(self, server: VLLMServer, student: Any) -> None:
        """Let the first process give the server the weights of the step. ServerProblem, Stopped, in all of them."""
        problem: ServerProblem | Stopped | None = None
        if self.args.process_index == 0:
            try:
                server.update_weights(student, self.state.global_step)
            except (ServerProblem, Stopped) as found:
                problem = found
        problem = self._in_any_process(problem)
        if problem is not None:
            raise problem

    def floating_point_ops(self, inputs: Inputs) -> int:
        """Estimate what the student computes for a batch."""
        of_batch = super().floating_point_ops
        return sum(int(of_batch(dict(part.batch.student))) for part in inputs["parts"])

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        """Run a batch forward and backward; what comes after the last one is the optimizer's."""
        self._times.begin("student")
        loss: Tensor = super().training_step(*arguments, **more)
        self._times.begin("optimizer")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Give the part of the step's loss that these rows are."""
        losses = [self._loss(model, part, num_items_in_batch) for part in inputs["parts"]]
        # gradients are averaged over processes, counts were summed
        loss = torch.stack(losses).sum() * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _loss(self, model: nn.Module, part: WeightedBatch, counts: Tensor | None) -> Tensor:
        """Give the part of the step's loss that a batch is (`weighted_loss`); `counts` are those of the step."""
        batch = part.batch
        inputs = self._ask(self._teachers_of(part), batch, every_token=part.samples is not None)
        sums = self._student_sums(model, batch, inputs)
        sizes = batch.student["input_ids"].numel(), batch.tokens, len(batch.labels)
        of_teachers = [0 if side.empty else side.tokens for side in batch.teachers]
        own = torch.tensor([*sizes, *_counts(part), *of_teachers], device=sums.ce.device)
        labels, *groups = (own[3 : 4 + len(of_teachers)] if counts is None else counts).unbind()
        weights = [objective.weight for objective in self.objectives]
        loss = weighted_loss(sums, alpha=part.alpha, weights=weights, labels=labels, groups=groups)
        if part.is_dummy:
            return 0 * loss
        ce = sums.ce
        if part.samples is not None:
            ce = torch.zeros_like(ce)
            signals = [None if one is None else one.signal for one in inputs]
            step, logprobs = self.state.global_step + 1, sums.label_logprobs
            self._logprobs.append(SampleLogprobs.of(step, part.samples, batch, logprobs, signals))
        logged = [part for kd in sums.kd for part in (kd.kd, kd.matched_mass, kd.pairs)]
        self._sums += torch.stack([part.detach() for part in (ce, *logged, *own)])
        self._rows += len(batch.rows)
        # looked at where the host waits for the device anyway: when a line is logged or a checkpoint written
        rows = batch.rows if part.samples is None else tuple(sample.number for sample in part.samples)
        self._unseen.append((self.state.global_step + 1, rows, _finite(loss, sums, batch)))
        return loss

    def loss_sums(
        self, model: nn.Module, batch: AlignedBatch, teachers: Sequence[Teacher | None] | None = None
    ) -> LossSums:
        """Run the teachers, those of the objectives unless given, and the student, and the methods on their logits."""
        if teachers is None:
            teachers = [objective.teacher for objective in self.objectives]
        # the teachers first: their logits are gone before the student keeps anything
        return self._student_sums(model, batch, self._ask(teachers, batch))

    def _ask(
        self, teachers: Sequence[Teacher | None], batch: AlignedBatch, *, every_token: bool = False
    ) -> list[LossInputs | None]:
        """Ask the teachers about a batch, also for the log-probability of `every_token` that methods do not read."""
        self._times.begin("teacher")
        return [
            None if teacher is None else self._inputs(teacher, batch, nth, every_token)
            for nth, teacher in enumerate(teachers)
        ]

    def _student_sums(
        self, model: nn.Module, batch: AlignedBatch, inputs: Sequence[LossInputs | None]
    ) -> LossSums:
        self._times.begin("student")
        student = _unwrapped(self.accelerator.unwrap_model(model))
        with self.accelerator.autocast():
            head = student.get_output_embeddings()
            logits = logits_at(model, head, batch.label_positions, **batch.student)
        return loss_sums(logits, batch.labels, inputs)

    def _shard_teachers(self) -> dict[int, Local]:
        """Put the teachers that are in memory in shards where the student is; give them by their numbers."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return {}
        teachers = [each.teacher for each in self.objectives]
        found = {nth: teacher for nth, teacher in enumerate(teachers) if isinstance(teacher, Local)}
        for teacher in found.values():
            shard_frozen(teacher.model)
        return found

    def _inputs(
        self, teacher: Teacher, batch: AlignedBatch, nth: int, every_token: bool
    ) -> LossInputs | None:
        """Ask the `nth` teacher; None where the batch has no group for it."""
        side = batch.teachers[nth]
        if side.empty:
            if nth in self._sharded_teachers:
                self._sharded_teachers[nth].join()
            return None
        method = self.objectives[nth].method
        request = method.signal_request
        if every_token:
            request = replace(request, token_logprobs=True)
        signal = teacher.signal(batch.of_teacher(nth), request)
        return LossInputs.of(method, signal, batch, side)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to what is logged; the closing summary of a run has none."""
        if "loss" in logs:
            self._check_finite()
            entry = self._step_log(logs)
            self.history.append(entry)
            said = asdict(entry)
            logs |= {name: said[name] for name in ("ce", "tokens", "tokens_per_second", "padding")}
            logs |= {f"seconds_{part}": taken for part, taken in said["seconds"].items()}
            logs |= _by_teacher(entry.teachers)
            if entry.samples is not None:
                logs |= _of_samples(entry.samples)
            if entry.ce is None:
                del logs["ce"]
            self._tell()
        super().log(logs, start_time)

    def _tell(self) -> None:
        self._on_step(
            self.state.global_step, self.state.max_steps, self.history[-1] if self.history else None
        )

    def _maybe_log_save_evaluate(self, *arguments: Any, **more: Any) -> None:
        self._times.begin(None)
        super()._maybe_log_save_evaluate(*arguments, **more)

    def _step_log(self, logs: dict[str, float]) -> StepLog:
        sums = self._over_processes(self._sums)
        self._sums = self._no_sums()
        many = len(self.objectives)
        ce, *parts = sums.tolist()
        positions, tokens, labels, ce_labels, *groups = parts[3 * many : -many or None]
        seconds, before = self._times.take(), self.history[-1].step if self.history else 0
        steps = self.state.global_step - before
        return StepLog(
            step=self.state.global_step,
            loss=logs["loss"],
            ce=ce / ce_labels if ce_labels else None,
            teachers=tuple(self._teacher_logs(parts, groups, labels)),
            learning_rate=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            tokens=int(tokens),
            tokens_per_second=tokens / sum(seconds.values()),
            padding=1 - tokens / positions,
            seconds=StepSeconds(**{part: taken / steps for part, taken in seconds.items()}),
            samples=self._sample_log(),
            teacher_tokens=tuple(map(int, parts[4 + 4 * many :])),
        )

    def _sample_log(self) -> SampleLog | None:
        """Give what the samples since the log before are like, and write down those of the latest step."""
        if self.on_policy is None:
            return None
        nothing = torch.zeros(5 + 2 * len(self.objectives), dtype=torch.float64)
        sums = torch.cat((sum((each.sums() for each in self._logprobs), nothing), torch.tensor([self._rows])))
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device, self._sums.dtype), "sum").cpu()
        latest = [each for each in self._logprobs if each.step == self.state.global_step]
        self.samples = [record for each in latest for record in each.records()]
        if self.args.should_save and self.samples:
            add_samples(Path(str(self.args.output_dir)), self.samples)
        tokens, seconds = self._drawn
        self._logprobs, self._rows, self._drawn = [], 0, np.zeros(2)
        return sample_log(sums[:-1], float(sums[-1]), float(tokens / seconds) if tokens else None)

    def _teacher_logs(
        self, parts: Sequence[float], groups: Sequence[float], labels: float
    ) -> Iterator[TeacherLog]:
        """Take the mean of kd, matched mass and pairs over each teacher's groups, whose sums `parts` begins with."""
        for nth, (objective, count) in enumerate(zip(self.objectives, groups, strict=True)):
            kd, mass, pairs = (part / max(count, 1) for part in parts[3 * nth : 3 * nth + 3])
            yield TeacherLog(objective.name, kd, mass, pairs, count / labels)

    def _no_sums(self) -> Tensor:
        """Make the sums of ce; of kd, matched mass and pairs of each teacher; of positions, tokens, labels, those with
        cross-entropy, and each teacher's groups; of each teacher's tokens."""
        device = self.args.device
        kind = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        return torch.zeros(5 + 5 * len(self.objectives), device=device, dtype=kind)

    # Evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate the student as it is, log that, and stop the run where `patience` is at its end."""
        entry = self.evaluation()
        self.evaluations.append(entry)
        self._on_evaluation(1, 1, entry)
        said = asdict(entry)
        metrics = {f"eval_{name}": said[name] for name in ("ce", "bits_per_byte", "seconds")}
        if entry.loss is not None:
            metrics["eval_loss"] = entry.loss
        metrics |= {f"eval_{name}": value for name, value in _by_teacher(entry.teachers).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_training_stop |= self.stopped_early
        return metrics

    def evaluation(self) -> EvalLog:
        """Compute the objective over the held-out rows as if they were one step, without a trace in training."""
        assert self.heldout is not None
        began, model = perf_counter(), self.model_wrapped
        with as_it_was(model, self.args.device):
            sums = self._heldout_sums(model, self.heldout).tolist()
        self._times.begin(None)
        self._times.take()
        return self._eval_log(self.heldout, sums, perf_counter() - began)

    def _heldout_sums(self, model: nn.Module, heldout: Heldout) -> Tensor:
        """Sum up loss, ce, nats of what spells the text, and kd, matched mass and pairs of each teacher."""
        sums = self._no_sums()[: 3 + 3 * len(self.objectives)]
        labels, *groups = heldout.counts
        weights = [objective.weight for objective in self.objectives]
        batches, processes = heldout.batches(self.args.eval_batch_size), self.args.world_size
        collate = _CollatorByAlpha(self._collator, heldout.mixture, processes > 1)
        teachers = [objective.heldout for objective in self.objectives]
        mine = [first + self.args.process_index for first in range(0, len(batches), processes)]
        # each process runs as many batches as the others: what is too many does not count
        rows = ([heldout.features[row] for row in batches[min(nth, len(batches) - 1)]] for nth in mine)
        for nth, inputs in zip(mine, asked_ahead(map(collate, rows), teachers), strict=True):
            for part in inputs["parts"]:
                batch = part.batch.to(self.args.device)
                found = self.loss_sums(model, batch, teachers)
                if part.is_dummy or nth >= len(batches):
                    continue
                loss = weighted_loss(found, alpha=part.alpha, weights=weights, labels=labels, groups=groups)
                spells = torch.from_numpy(heldout.spelled.at(batch.rows)).to(found.ce.device)
                nats = -(found.label_logprobs * spells).sum()
                each = [value for kd in found.kd for value in (kd.kd, kd.matched_mass, kd.pairs)]
                sums += torch.stack([value.detach() for value in (loss, found.ce, nats, *each)])
            self._on_evaluation(min(nth - nth % processes + processes, len(batches)), len(batches), None)
        return self.accelerator.reduce(sums, "sum") if processes > 1 else sums

    def _eval_log(self, heldout: Heldout, sums: list[float], seconds: float) -> EvalLog:
        loss, ce, nats, *parts = sums
        if not math.isfinite(loss):
            raise NotFinite("the loss of the held-out rows", self.state.global_step, self._last_good())
        labels, *groups = heldout.counts
        teachers = self._teacher_logs(parts, groups, labels)
        asked = [objective.heldout is not None for objective in self.objectives]
        made = EvalLog(
            step=self.state.global_step,
            loss=loss if all(asked) else None,
            ce=ce / labels,
            bits_per_byte=nats / math.log(2) / max(heldout.spelled.bytes, 1),
            teachers=tuple(log for log, is_asked in zip(teachers, asked, strict=True) if is_asked),
            is_best=True,
            seconds=seconds,
        )
        metric = heldout.settings.metric
        better = self.best is None or getattr(made, metric) < getattr(self.best, metric)
        return replace(made, is_best=better)

    @property
    def best(self) -> EvalLog | None:
        """Give the best evaluation so far, None before the first."""
        return next((log for log in reversed(self.evaluations) if log.is_best), None)

    @property
    def stopped_early(self) -> bool:
        """Say whether as many evaluations as the run has patience for were not better than one before."""
        patience = self.heldout.settings.patience if self.heldout else None
        if patience is None:
            return False
        last = self.evaluations[-patience:]
        return len(last) == patience and not any(log.is_best for log in last)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Have the best weights written to a checkpoint; a run that stops early has those that it needs."""
        if self.stopped_early:
            self.control.should_save = False
        self.control.should_save |= self.evaluations[-1].is_best
        return self.evaluations[-1].is_best

    def load_best(self) -> None:
        """Load the weights of the best evaluation, where there was one. Raises BadArtifact for a damaged checkpoint."""
        if self.best is not None and self.best.step != self.state.global_step:
            checkpoint = self._checkpoint(self.best.step)
            check_seal(checkpoint, LOST)
            self.state.best_model_checkpoint = str(checkpoint)
            self._load_best_model()

    # Checkpoints

    def _checkpoint(self, step: int) -> Path:
        return Path(str(self.args.output_dir)) / f"checkpoint-{step}"

    def read_logs(self, checkpoint: Path) -> None:
        """Take what was logged up to a checkpoint. BadArtifact where that of the best evaluation is not there."""
        self.history = read_history(checkpoint)
        if self.on_policy is not None:
            prompts = self.on_policy.fingerprint
            self._pending.extend(read_pending(checkpoint, self.args.process_index, prompts))
            if self.args.should_save:
                keep_samples_until(checkpoint.parent, self.history[-1].step)
        if self.heldout is not None:
            self.evaluations = read_evaluations(checkpoint, self.heldout.fingerprint)
        if self.best is not None:
            check_seal(self._checkpoint(self.best.step), LOST)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint of good weights only, and the checksums of its files when all are there."""
        self._check_finite()
        # older ones go when this one is whole: the best may be among them
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        checkpoint = self._checkpoint(self.state.global_step)
        if self.on_policy is not None:
            write_pending(self._pending, checkpoint, self.args.process_index, self.on_policy.fingerprint)
        self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
        if self.args.should_save:
            rows = self.heldout.fingerprint if self.heldout else None
            write_logs(checkpoint, self.history, self.evaluations, rows)
            seal_checkpoint(checkpoint)
            best = None if self.best is None else str(self._checkpoint(self.best.step))
            rotate_checkpoints(str(checkpoint.parent), limit, best, use_mtime=True)

    def _check_finite(self) -> None:
        """Stop the run where a loss since the last look was not finite."""
        if not self._unseen:
            return
        flags = torch.cat([flags for _, _, flags in self._unseen]).tolist()
        unseen, self._unseen = self._unseen, []
        for step, rows, _ in unseen:
            loss, *of_rows = flags[: len(rows) + 1]
            flags = flags[len(rows) + 1 :]
            if not loss:
                bad = [row for row, good in zip(rows, of_rows, strict=True) if not good]
                raise self._not_finite(step, bad or rows)

    def _not_finite(self, step: int, rows: Sequence[int]) -> NotFinite:
        named = f"row {rows[0]}" if len(rows) == 1 else f"rows {', '.join(map(str, rows))}"
        return NotFinite(f"the loss of {named}", step, self._last_good())

    def _last_good(self) -> str:
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
        return (
            f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was due before it"
        )


def asked_ahead(batches: Iterator[Inputs], teachers: Sequence[Teacher | None]) -> Iterator[Inputs]:
    """Give batches, while teachers behind a server are asked about those that follow."""
    served = [(nth, teacher) for nth, teacher in enumerate(teachers) if isinstance(teacher, Served)]
    rows = max((teacher.client.settings.in_flight for _, teacher in served), default=0)
    ahead: deque[Inputs] = deque()
    while True:
        while not ahead or sum(_rows(inputs) for inputs in ahead) < rows:
            if (following := next(batches, None)) is None:
                break
            for part in following["parts"]:
                for nth, teacher in served:
                    if not part.batch.teachers[nth].empty:
                        teacher.prefetch(part.batch.of_teacher(nth))
            ahead.append(following)
        if not ahead:
            return
        yield ahead.popleft()


def _rows(inputs: Inputs) -> int:
    return sum(len(part.batch.rows) for part in inputs["parts"])


def _unwrapped(student: Any) -> Any:
    """Take accelerate's wrapper off, which in mixed precision makes a float32 copy of all logits.

    By hand, because accelerate has no switch for it: `unwrap_model(keep_fp32_wrapper=False)` takes off a decorator
    of the model's own as well. Nor can the wrapper be avoided by an autocast of ours with accelerate's mixed
    precision off: FSDP and DeepSpeed take theirs from there, and a launcher's configuration turns it on again.
    """
    if (original := vars(student).pop("_original_forward", None)) is not None:
        student.forward = original
    return student


def _finite(loss: Tensor, sums: LossSums, batch: AlignedBatch) -> Tensor:
    """Say whether the loss is finite, and then, for each row, whether its labels' part of it is."""
    bad = torch.isfinite(sums.label_logprobs).logical_not().to(torch.int32)
    of_rows = torch.zeros(len(batch.rows), dtype=torch.int32, device=bad.device)
    of_rows = of_rows.index_add(0, batch.label_row, bad)
    return torch.cat((torch.isfinite(loss.detach()).unsqueeze(0), of_rows == 0))


def _by_teacher(teachers: Sequence[TeacherLog]) -> dict[str, float]:
    """Name what is logged of each teacher, by its number from the second on."""
    return {
        f"{name}_{nth}" if nth else name: getattr(teacher, name)
        for nth, teacher in enumerate(teachers)
        for name in ("kd", "matched_mass")
    }


def _of_samples(samples: SampleLog) -> dict[str, float]:
    """Name what is logged of samples."""
    named = {
        f"samples_{name}": value
        for name, value in asdict(samples).items()
        if value is not None and name != "teacher_logprobs"
    }
    for nth, value in enumerate(samples.teacher_logprobs):
        named[f"samples_teacher_logprob_{nth}" if nth else "samples_teacher_logprob"] = value
    return named


def _counts(part: WeightedBatch) -> list[int]:
    """Count the labels of a batch that have a cross-entropy, and the groups of each teacher."""
    labels = len(part.batch.labels) if part.samples is None else 0
    return [labels, *(side.groups for side in part.batch.teachers)]


class _AfterStep(TrainerCallback):
    def __init__(self, tell: Callable[[], None], stopping: Callable[[], bool]) -> None:
        self.tell, self.stopping = tell, stopping

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopping() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        # a checkpoint ends what a line sums up, so that a run which goes on from it logs the same lines
        # (and so does an evaluation, after which one may be due)
        control.should_log |= control.should_save or control.should_evaluate
        control.should_log |= state.global_step == state.max_steps
        if not control.should_log:  # else it is told with the line
            self.tell()
