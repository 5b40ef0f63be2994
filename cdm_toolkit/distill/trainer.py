"""`transformers.Trainer` with a loss that looks at two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cdm_toolkit.distill.gather import logits_at
from cdm_toolkit.distill.losses.record import Gathered, LossParts, Method, objective
from cdm_toolkit.distill.losses.sft import sft
from cdm_toolkit.distill.output import last_checkpoint
from cdm_toolkit.errors import NotFinite

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdm_toolkit.distill.collate import Batch, Collator
    from cdm_toolkit.distill.config import DistillConfig
    from cdm_toolkit.distill.data import Features
    from cdm_toolkit.distill.teacher import Teacher


@dataclass(frozen=True, slots=True)
class StepLog:
    """Means over the optimizer steps since the log before, up to `step`.

    `loss` is the objective, `ce` in nats a label, `kd` in nats a position; `matched_mass` is the teacher's
    probability on ids that have a pair, `pairs` their number at a position, `aligned_share` the positions for
    each label. These four are 0 under `sft`. `tokens` are the student's, prompts included and padding not: a
    sum.
    """

    step: int
    loss: float
    ce: float
    kd: float
    matched_mass: float
    pairs: float
    aligned_share: float
    learning_rate: float
    grad_norm: float
    tokens: int


class DistillTrainer(Trainer):
    """Train a student on a method's loss; everything else is the Trainer's."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: nn.Module,
        arguments: TrainingArguments,
        features: list[Features],
        collator: Collator,
        tokenizer: Any,
        *,
        method: Method,
        alpha: float,
        teacher: Teacher | None,
        on_step: Callable[[int, int, StepLog | None], None],
    ) -> None:
        """Give `on_step` the steps done and to do after each, and the latest log."""
        super().__init__(
            model=student,
            args=arguments,
            data_collator=collator,
            train_dataset=features,
            processing_class=tokenizer,
            callbacks=[
                _AfterStep(lambda done, of: on_step(done, of, self.history[-1] if self.history else None))
            ],
        )
        self.remove_callback(PrinterCallback)
        self.method, self.alpha, self.teacher = method, alpha, teacher
        self.history: list[StepLog] = []
        self._sums = _no_sums(self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Take the batches of one optimizer step, and count its labels and groups over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor([[len(b["labels"]), sum(b["groups"])] for b in batches], device=device).sum(0)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Give the part of the step's loss that this batch is (`objective`)."""
        parts = self.loss_parts(model, inputs)
        own = torch.tensor([len(inputs["labels"]), sum(inputs["groups"])], device=parts.ce.device)
        tokens, positions = own if num_items_in_batch is None else num_items_in_batch
        loss = objective(parts, alpha=self.alpha, tokens=tokens, positions=positions)
        if not torch.isfinite(loss):  # before the weights are touched
            raise self._not_finite(inputs)
        sums = (parts.ce, parts.kd, parts.matched_mass, parts.pairs, *own, inputs["attention_mask"].sum())
        self._sums += torch.stack([part.detach() for part in sums])
        # gradients are averaged over processes, counts were summed
        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def loss_parts(self, model: nn.Module, inputs: Batch) -> LossParts:
        """Run both models, and the method on what they say."""
        logits = logits_at(
            model,
            self.accelerator.unwrap_model(model).get_output_embeddings(),
            inputs["label_at"],
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **({"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}),
        )
        if self.teacher is None or "teacher_at" not in inputs:
            return sft(Gathered(logits, inputs["labels"]))
        gathered = Gathered(
            logits,
            inputs["labels"],
            student_rows=inputs["student_rows"],
            student_group=inputs.get("student_group"),
            teacher=self.teacher.top_k(inputs),
        )
        return self.method(gathered)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to what is logged; the closing summary of a run has none."""
        if "loss" in logs:
            sums = self.accelerator.reduce(self._sums, "sum") if self.args.world_size > 1 else self._sums
            ce, kd, mass, pairs, labels, positions, tokens = sums.tolist()
            self._sums = _no_sums(self.args.device)
            seen = max(positions, 1)
            logs |= {
                "ce": ce / labels,
                "kd": kd / seen,
                "matched_mass": mass / seen,
                "pairs": pairs / seen,
                "aligned_share": positions / labels,
                "tokens": int(tokens),
            }
            figures: dict[str, Any] = {
                name: logs[name] for name in StepLog.__dataclass_fields__ if name in logs
            }
            self.history.append(StepLog(step=self.state.global_step, **figures))
        super().log(logs, start_time)

    def _not_finite(self, inputs: Batch) -> NotFinite:
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
        kept = (
            f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was due before it"
        )
        rows = ", ".join(map(str, inputs["rows"]))
        return NotFinite(f"the loss of rows {rows}", self.state.global_step + 1, kept)


def _no_sums(device: torch.device) -> Tensor:
    """Make the sums of ce, kd, matched mass, pairs, labels, groups and tokens; MPS has no float64."""
    return torch.zeros(7, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


class _AfterStep(TrainerCallback):
    def __init__(self, call: Callable[[int, int], None]) -> None:
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= state.global_step == state.max_steps
        self.call(state.global_step, state.max_steps)


def training_arguments(config: DistillConfig) -> TrainingArguments:
    """Translate a run's settings."""
    saves = config.save_every > 0
    arguments = TrainingArguments(
        output_dir=config.output,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=config.dtype == "bfloat16",
        use_cpu=config.device == "cpu",
        save_strategy="steps" if saves else "no",
        save_steps=config.save_every if saves else 500,
        save_total_limit=2,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=config.device == "cuda",
    )
    # One process drives one device: several go by `accelerate launch`. DataParallel would split the flat
    # positions.
    _ = arguments.device
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
