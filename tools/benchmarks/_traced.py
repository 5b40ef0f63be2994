"""Trace training steps on CUDA tensors without data: run as a program, with a list of `Sizes` as JSON; prints JSON.

It is a program of its own because a CPU build of torch takes a backward pass over CUDA tensors only where
`_fake_cuda.cpp` was loaded before it; `trace.py` does that.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

if __name__ == "__main__" and sys.argv[2]:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)

import numpy as np
import torch
from accelerate import dispatch_model
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks._live import Held, LiveBytes
from cdm_toolkit import kd
from cdm_toolkit.distill.step_times import StepTimes
from cdm_toolkit.distill.trainer import DistillTrainer, TeacherObjective, WeightedBatch
from cdm_toolkit.kd.aligned_rows import AlignedRow, AlignedTeacherRow
from cdm_toolkit.kd.batch import AlignedBatch, Collator
from cdm_toolkit.kd.x_token import PREIMAGES
from cdm_toolkit.teachers import Local
from cdm_toolkit.vocab_map.partners import WIDTH
from cdm_toolkit.vocab_map.spelling import LONGEST

WEIGHTS = 4
"""Teacher ids that a student id stands for in a projection, by default."""
VOCAB_T, VOCAB_S, ROWS_S = 128_256, 151_936, 152_064
FUSED = "fused"
"""Name of the attention that CUDA takes for a batch without padding."""
OURS, THEIRS = "sft", "sft of transformers"
"""Steps without a method: a forward pass of the teacher that nobody uses, and then plain SFT."""
SAMPLING, ON_SAMPLES = "sampling", "spelling on samples"
"""The student reads whole rows and keeps what sampling would have kept of them; and what it learns of samples."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is traced: a full batch, Llama-3-8B's and Qwen2-0.5B's widths, and these layers of both."""

    steps: Sequence[str]
    batch: int = 4
    length: int = 1024
    layers_t: int = 32
    layers_s: int = 24
    mixed: bool = True
    """Mixed precision in bfloat16, else all of the student in float32."""
    same_tokenizer: bool = False
    """The teacher has the student's vocabulary."""
    teacher_on: Sequence[str] = ("cuda:0",)
    """The teacher's device; or two, of its layers and of its head. The student is on cuda:0."""

    @property
    def vocab_t(self) -> tuple[int, int]:
        """Ids of the teacher's tokenizer, and rows of its embedding."""
        return (VOCAB_S, ROWS_S) if self.same_tokenizer else (VOCAB_T, VOCAB_T)

    @property
    def labels(self) -> int:
        return self.batch * (self.length - 1)


@dataclass(frozen=True, slots=True)
class Traced:
    """The bytes of one step: at its peak, and what lay there before it."""

    step: str
    peak: int
    before: int
    at_peak: list[Held]
    """The largest first."""
    float32_logits: list[Held]
    """What was made in the step that has as many elements as the smaller of the logits, in float32."""
    elsewhere: Mapping[str, tuple[int, int]]
    """The bytes of the step on other devices: at the peak, and what lay there before it."""
    teacher_weights: int


class TrainerStep(DistillTrainer):
    """The trainer's loss, without what `transformers.Trainer` sets up around it."""

    def __init__(self, objectives: Sequence[TeacherObjective], *, mixed: bool) -> None:
        self.objectives = tuple(objectives)
        self.args: Any = SimpleNamespace(device=torch.device("cuda"))
        self.state: Any = SimpleNamespace(global_step=0)
        self.accelerator: Any = SimpleNamespace(
            unwrap_model=lambda model: model, num_processes=1, autocast=partial(autocast, enabled=mixed)
        )
        self._sums = self._no_sums()
        self._unseen = []
        self._rows, self._logprobs = 0, []
        self._times = StepTimes(torch.device("cpu"))  # there are no events without a GPU


@contextmanager
def autocast(*, enabled: bool) -> Iterator[None]:
    """Do as `torch.autocast("cuda", torch.bfloat16)`, which turns itself off where there is no GPU."""
    was = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", was)


def fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Take the kernel that `scaled_dot_product_attention` chooses on CUDA; without a GPU it chooses another."""
    assert mask is None
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal=True, scale=scaling
    )
    return found[0].transpose(1, 2).contiguous(), None


def models(sizes: Sizes) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Make the teacher, in bfloat16, and the student."""
    with torch.device(sizes.teacher_on[0]):
        teacher = LlamaForCausalLM._from_config(
            LlamaConfig(
                vocab_size=sizes.vocab_t[1],
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=sizes.layers_t,
                num_attention_heads=32,
                num_key_value_heads=8,
                max_position_embeddings=8192,
            ),
            attn_implementation=FUSED,
            dtype=torch.bfloat16,
        )
    if len(sizes.teacher_on) > 1:
        teacher.lm_head = torch.nn.Linear(
            4096, sizes.vocab_t[1], bias=False, device=sizes.teacher_on[1], dtype=torch.bfloat16
        )
        teacher = dispatch_model(teacher, dict(zip(("model", "lm_head"), sizes.teacher_on, strict=True)))
    with torch.device("cuda"):
        student = Qwen2ForCausalLM._from_config(
            Qwen2Config(
                vocab_size=ROWS_S,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=sizes.layers_s,
                num_attention_heads=14,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            attn_implementation=FUSED,
            dtype=torch.float32,
        )
    if sizes.mixed:
        _as_accelerate_does(student)
    return teacher, student.train()


def _as_accelerate_does(student: Any) -> None:
    """Wrap the forward pass as `Accelerator.prepare` does for mixed precision."""
    forward = student._original_forward = student.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        with autocast(enabled=True):
            return forward(*args, **kwargs)

    student.forward = convert_outputs_to_fp32(cast)


def full_batch(sizes: Sizes) -> AlignedBatch:
    """Make a batch in which each token but the first of a row is a label, and a group of one token a side."""
    at = np.arange(1, sizes.length, dtype=np.int32)
    teacher = AlignedTeacherRow(np.zeros(sizes.length, np.int32), np.stack((at, at + 1, at, at + 1), axis=1))
    turns = np.array([[1, sizes.length]], np.int32)
    rows = [
        AlignedRow(row, np.zeros(sizes.length, np.int32), turns, (teacher,)) for row in range(sizes.batch)
    ]
    return Collator((("t", "s"),))(rows)


def on_cuda(batch: AlignedBatch, mode: FakeTensorMode) -> AlignedBatch:
    """Move a batch to the fake device."""

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return mode.from_tensor(value).to("cuda")
        if isinstance(value, Mapping):
            return {name: fake(part) for name, part in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            parts = {field.name: fake(getattr(value, field.name)) for field in fields(value)}
            return replace(value, **parts)
        return tuple(fake(part) for part in value) if isinstance(value, tuple) else value

    moved: AlignedBatch = fake(batch)
    return moved


TABLES: Mapping[str, Callable[[int], Mapping[str, Any]]] = {
    "spelling": lambda vocab_t: {
        "spelling": (vocab_t, LONGEST),
        "beginning": (VOCAB_S,),
        "longest_prefix": (VOCAB_S,),
        "trie_keys": (VOCAB_S,),
        "trie_ends": (VOCAB_S + 1,),
    },
    "cdm": lambda vocab_t: {
        "partner_ids": (vocab_t + 1, WIDTH),
        "partner_keys": (vocab_t + 1, WIDTH),
        "exact": (vocab_t,),
    },
    "exact": lambda vocab_t: {"partner": (vocab_t,)},
    "min-ed": lambda vocab_t: {"partner": (vocab_t,)},
    "prefix": lambda vocab_t: {"partner": (vocab_t,)},
    "gold": lambda vocab_t: {"partner": (vocab_t,), "claimed": (VOCAB_S,)},
    "simct": lambda vocab_t: {"partner": (vocab_t,)},
    "likelihood": lambda vocab_t: {"spelling": (vocab_t, LONGEST), "length": (vocab_t,)},
    "x-token": lambda vocab_t: {
        "teacher_ids": (VOCAB_S, WEIGHTS),
        "weights": (VOCAB_S, WEIGHTS),
        "preimages": (vocab_t, PREIMAGES),
    },
}
"""Shapes of the tables of each method."""
DTYPES = {"partner_keys": torch.int32, "claimed": torch.bool, "weights": torch.float32}


def method(name: str, sizes: Sizes) -> kd.Method[Any, Any]:
    """Make a method whose tables have the sizes of real ones."""
    vocab_t = sizes.vocab_t[0]
    kind = kd.find_method(name)
    pair: Any = SimpleNamespace(
        vocab_t=vocab_t,
        vocab_s=VOCAB_S,
        name_t="t",
        name_s="s",
        same_tokenizer=sizes.same_tokenizer,
        nesting_fault=lambda: "",
    )
    with patch.object(kind, "build_tables", lambda self, pair: None):
        made = kind(pair)
    for table, shape in TABLES.get(name, lambda _: {})(vocab_t).items():
        zeros = torch.zeros(*shape, dtype=DTYPES.get(table, torch.long), device="cuda")
        made.register_buffer(table, zeros, persistent=False)
    made.matched_weight = 0.7  # of gold, which only real tables have
    return made


def traced(name: str, sizes: Sizes) -> Traced:
    """Trace two optimizer steps, and look at the second, which finds the optimizer's state there.

    A tensor on another device and a look at values on the device raise here what FakeTensorMode raises.
    """
    plain = name in (OURS, THEIRS, SAMPLING)
    made = full_batch(sizes)
    live = LiveBytes("cuda:0")
    others = {device: LiveBytes(device) for device in sizes.teacher_on if device != "cuda:0"}
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, live, ExitStack() as stack:
        for other in others.values():
            stack.enter_context(other)
        teacher, student = models(sizes)
        local = Local(teacher, vocab=sizes.vocab_t[0])
        with torch.device("cuda"):
            taken = method("spelling" if name == ON_SAMPLES else name, sizes) if not plain else None
            objectives = [TeacherObjective("teacher", local, taken, sampled=local)] if taken else []
        loss = _loss(name, TrainerStep(objectives, mixed=sizes.mixed), local, student)
        batch = on_cuda(made, mode)
        counts = torch.tensor([sizes.labels] * (1 + len(objectives)), device="cuda")
        optimizer = torch.optim.AdamW(student.parameters(), fused=True)
        if name == SAMPLING:
            live.start()
            _keep_keys_and_values(student.eval(), batch)
        for _ in range(0 if name == SAMPLING else 2):
            for each in (live, *others.values()):
                each.start()
            loss(batch, counts).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        smaller = sizes.labels * min(sizes.vocab_t[0], VOCAB_S)
        return Traced(
            name,
            live.peak,
            live.at_start,
            sorted(live.at_peak, key=lambda held: -held.bytes)[:20],
            [held for held in live.made if held.dtype == "float32" and held.elements >= smaller],
            {device: (other.peak, other.at_start) for device, other in others.items()},
            sum(tensor.nbytes for tensor in (*teacher.parameters(), *teacher.buffers())),
        )


@torch.no_grad()
def _keep_keys_and_values(student: PreTrainedModel, batch: AlignedBatch) -> None:
    student(input_ids=batch.student["input_ids"], use_cache=True, logits_to_keep=1)


def _loss(
    name: str, trainer: TrainerStep, teacher: Local, student: PreTrainedModel
) -> Callable[[AlignedBatch, Tensor], Tensor]:
    """Give the loss of a step: a method's, or one of SFT after the teacher was run for nothing."""

    def of_method(batch: AlignedBatch, counts: Tensor) -> Tensor:
        part = WeightedBatch(batch, 0.5 if trainer.objectives else 1.0)
        if name == ON_SAMPLES:
            of_rows: Any = tuple(SimpleNamespace(number=row) for row in batch.rows)
            part = WeightedBatch(batch, 0.0, samples=of_rows)
        inputs: Any = {"parts": [part]}
        loss: Tensor = trainer.compute_loss(student, inputs, num_items_in_batch=counts)
        return loss

    def after_teacher(batch: AlignedBatch, counts: Tensor) -> Tensor:
        teacher.signal(batch, kd.SignalRequest(top_k=1))
        if name == OURS:
            return of_method(replace(batch, teachers=()), counts)
        ids = batch.student["input_ids"]
        loss: Tensor = student(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    return of_method if trainer.objectives else after_teacher


def register_attention() -> None:
    """Make `fused_attention` known to transformers."""
    AttentionInterface.register(FUSED, fused_attention)
    AttentionMaskInterface.register(FUSED, lambda *_, **__: None)


def main() -> None:
    register_attention()
    several = [Sizes(**given) for given in json.loads(sys.argv[1])]
    json.dump([[asdict(traced(name, sizes)) for name in sizes.steps] for sizes in several], sys.stdout)


if __name__ == "__main__":
    main()
