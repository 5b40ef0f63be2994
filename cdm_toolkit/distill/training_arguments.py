"""The settings of a run as transformers' `TrainingArguments`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from cdm_toolkit.errors import BadOption, UnknownName

if TYPE_CHECKING:
    from cdm_toolkit.distill.settings import DistillConfig

OWN_SETTINGS: Mapping[str, str] = {
    "output_dir": "output",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "learning_rate": "train.lr",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "seed": "train.seed",
    "bf16": "train.dtype",
    "activation_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "torch_compile": "train.compile",
    "use_cpu": "train.device",
    "save_strategy": "train.save_every",
    "save_steps": "train.save_every",
    "logging_strategy": "train.log_every",
    "logging_steps": "train.log_every",
    "report_to": "train.report_to",
    "eval_strategy": "eval.every",
    "eval_steps": "eval.every",
    "metric_for_best_model": "eval.metric",
}
"""Fields of TrainingArguments that are settings of a run under another name."""
NOT_OURS: Mapping[str, str] = {
    "fp16": "losses of distillation overflow in it: train.dtype has bfloat16",
    "label_smoothing_factor": "the loss is this toolkit's own, from alpha and the methods",
    "train_sampling_strategy": "rows are ordered by train.group_by_length and the weights of their sources",
    "eval_on_start": "the best evaluation is that of a checkpoint, of which there is none before the first step",
    "load_best_model_at_end": "with `eval` the best is written as the student anyway",
    "greater_is_better": "the best has the least",
    "hub_token": "it would be in the student's provenance: log in, or set HF_TOKEN",
    "hub_strategy": "the student is uploaded once, when it is written",
    "hub_always_push": "the student is uploaded once, when it is written",
    "remove_unused_columns": "batches are this toolkit's own",
    "ddp_find_unused_parameters": "all parameters are used",
    "fsdp": "`accelerate launch` shards, by its own file",
    "fsdp_config": "`accelerate launch` shards, by its own file",
    "deepspeed": "`accelerate launch` shards, by its own file",
    "resume_from_checkpoint": "a run is gone on with by `resume`",
}
"""Fields that a run cannot have, and why."""


def training_arguments(config: DistillConfig, output: Path) -> TrainingArguments:
    """Translate a run's settings; `output` is where checkpoints go.

    Raises BadOption for a field of `train.trainer` that there is not, that is a setting of the run, or that
    transformers refuses.
    """
    train = config.train
    saves = train.save_every > 0
    own: dict[str, Any] = {
        "output_dir": str(output),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.grad_accumulation,
        "learning_rate": train.lr,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        "bf16": train.mixed_dtype == "bfloat16",
        "activation_checkpointing": train.gradient_checkpointing,
        "use_cpu": train.torch_device == "cpu",
        "save_strategy": "steps" if saves else "no",
        "save_steps": train.save_every if saves else 500,
        "save_total_limit": 2,
        "logging_steps": train.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": list(train.report_to) or "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": train.torch_device == "cuda",
    }
    if config.eval is not None:
        own |= {
            "eval_strategy": "steps",
            "eval_steps": config.eval.every,
            "per_device_eval_batch_size": train.batch_size,
            "metric_for_best_model": config.eval.metric,
            "greater_is_better": False,
        }
    others = _others(train.trainer or {})
    if others.pop("push_to_hub", False) and train.hub_repository is None:
        raise BadOption("train.trainer.hub_model_id", None, "the repository to upload to, such as me/student")
    for package in train.report_to:
        if find_spec(package) is None:
            raise BadOption(
                "train.report_to", package, f"one that is installed, or run: pip install {package}"
            )
    try:
        arguments = TrainingArguments(**own | others)
    except (ValueError, TypeError, ImportError) as error:
        if not others:
            raise
        raise BadOption("train.trainer", others, f"fields that transformers takes: {error}") from None
    # One process drives one device: several go by `accelerate launch`. DataParallel would split the flat
    # positions.
    _ = arguments.device
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _others(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names of fields that are handed on to TrainingArguments."""
    known = [field.name for field in fields(TrainingArguments) if field.init]
    for name in given:
        if name in OWN_SETTINGS:
            raise BadOption("train.trainer", name, f"the run's own setting {OWN_SETTINGS[name]}")
        if name in NOT_OURS:
            raise BadOption("train.trainer", name, f"it without this field: {NOT_OURS[name]}")
        if name not in known:
            raise UnknownName("field of TrainingArguments", name, known)
    return dict(given)
