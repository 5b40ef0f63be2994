"""Trace training steps on CUDA tensors without data: run as a program, with a `Sizes` as JSON; prints JSON.

It is a program of its own because a CPU build of torch takes a backward pass over CUDA tensors only where
`_fake_cuda.cpp` was loaded before it; `trace.py` does that.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__" and sys.argv[2]:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from cdm_toolkit.distill.collate import Batch, Collator, TeacherLayout
from cdm_toolkit.distill.config import CANDIDATES
from cdm_toolkit.distill.data import Features, TeacherFeatures
from cdm_toolkit.distill.losses.gold import GoldSettings, gold
from cdm_toolkit.distill.losses.methods import METHODS, Ingredients, MethodSpec, build_method
from cdm_toolkit.distill.losses.record import Method
from cdm_toolkit.distill.teacher import OnlineTeacher
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
from cdm_toolkit.distill.trainer import DistillTrainer, Lesson
from cdm_toolkit.errors import UnknownName
from cdm_toolkit.vocab_map.contextual import PairTable
from cdm_toolkit.vocab_map.partners import WIDTH
from cdm_toolkit.vocab_map.spelling import LONGEST

VOCAB_T, VOCAB_S, ROWS_S = 128_256, 151_936, 152_064
FUSED = "fused"
"""Name of the attention that CUDA takes for a batch without padding."""
OURS, THEIRS = "sft", "sft of transformers"
"""Steps without a method: a forward pass of the teacher that nobody uses, and then plain SFT."""


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


class TrainerStep(DistillTrainer):
    """The trainer's loss, without what `transformers.Trainer` sets up around it."""

    def __init__(self, lessons: Sequence[Lesson], *, mixed: bool) -> None:
        self.lessons, self.vocab_s = tuple(lessons), VOCAB_S
        self.alpha = 0.5 if lessons else 1.0
        self.args: Any = SimpleNamespace(device=torch.device("cuda"))
        self.state: Any = SimpleNamespace(global_step=0)
        self.accelerator: Any = SimpleNamespace(
            unwrap_model=lambda model: model, num_processes=1, autocast=partial(autocast, enabled=mixed)
        )
        self._sums = self._no_sums()
        self._unseen = []


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


def full_batch(sizes: Sizes, spec: MethodSpec | None) -> Batch:
    """Make a batch in which each token but the first of a row is a label, and a group of one token a side."""
    at = np.arange(1, sizes.length, dtype=np.int32)
    teacher = TeacherFeatures(np.zeros(sizes.length, np.int32), np.stack((at, at + 1, at, at + 1), axis=1))
    rows = [Features(row, np.zeros(sizes.length, np.int32), 1, (teacher,)) for row in range(sizes.batch)]
    layout = TeacherLayout()
    if spec is not None:
        layout = TeacherLayout(tokens=spec.needs_tokens, student_tokens=spec.needs_student_tokens)
    return Collator((layout,))(rows)


def on_cuda(value: Any, mode: FakeTensorMode) -> Any:
    """Move a batch as `transformers.Trainer` does; what is no tensor stays."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value).to("cuda")
    if isinstance(value, Mapping):
        return {name: on_cuda(part, mode) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(on_cuda(part, mode) for part in value)
    return value


def method(name: str, sizes: Sizes) -> Method:
    """Make a method of tables with the sizes of real ones."""

    def ids(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.long, device="cuda")

    vocab_t = sizes.vocab_t[0]
    if name == "gold":  # by hand: its weights are numbers, which only real tables have
        claimed = ids(VOCAB_S).bool()
        return partial(gold, settings=GoldSettings(ids(vocab_t), claimed, CANDIDATES, 0.7, 0.3))
    table = PairTable(ids(vocab_t + 1, WIDTH), ids(vocab_t + 1, WIDTH).int(), VOCAB_S)
    given = Ingredients(
        vocab_t,
        VOCAB_S,
        partner=ids(vocab_t),
        pairs=table,
        spelling=ids(vocab_t, LONGEST),
        beginning=ids(VOCAB_S),
        top_k=CANDIDATES,
    )
    return build_method(name, given)


def traced(name: str, sizes: Sizes) -> Traced:
    """Trace two optimizer steps, and look at the second, which finds the optimizer's state there.

    A tensor on another device and a look at values on the device raise here what FakeTensorMode raises.
    """
    if name not in {OURS, THEIRS, *METHODS}:
        raise UnknownName("method", name, [*METHODS])
    spec = METHODS.get(name)
    made = full_batch(sizes, spec)
    live = LiveBytes("cuda")
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, live:
        with torch.device("cuda"):
            teacher, student = models(sizes)
        k = 1 if spec is None or not spec.needs_top_k else CANDIDATES
        asked = OnlineTeacher(teacher, vocab_t=sizes.vocab_t[0], k=k)
        lessons = [] if spec is None else [Lesson("teacher", asked, method(name, sizes))]
        loss = _loss(name, TrainerStep(lessons, mixed=sizes.mixed), asked, student)
        batch = on_cuda(made, mode)
        counts = torch.tensor([sizes.labels] * (1 + len(lessons)), device="cuda")
        optimizer = torch.optim.AdamW(student.parameters(), fused=True)
        for _ in range(2):
            live.start()
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
        )


def _loss(
    name: str, trainer: TrainerStep, teacher: OnlineTeacher, student: PreTrainedModel
) -> Callable[[Any, Tensor], Tensor]:
    """Give the loss of a step: a method's, or one of SFT after the teacher was run for nothing."""

    def of_method(batch: Any, counts: Tensor) -> Tensor:
        loss: Tensor = trainer.compute_loss(student, batch, num_items_in_batch=counts)
        return loss

    def after_teacher(batch: Any, counts: Tensor) -> Tensor:
        teacher.says(batch["teachers"][0], batch["rows"])
        if name == OURS:
            return of_method(batch | {"teachers": ()}, counts)
        ids = batch["input_ids"]
        loss: Tensor = student(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    return of_method if trainer.lessons else after_teacher


def register_attention() -> None:
    """Make `fused_attention` known to transformers."""
    AttentionInterface.register(FUSED, fused_attention)
    AttentionMaskInterface.register(FUSED, lambda *_, **__: None)


def main() -> None:
    register_attention()
    sizes = Sizes(**json.loads(sys.argv[1]))
    json.dump([asdict(traced(name, sizes)) for name in sizes.steps], sys.stdout)


if __name__ == "__main__":
    main()
