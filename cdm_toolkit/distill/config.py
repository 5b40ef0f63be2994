"""What a run is told to do: one frozen record, checked as a whole before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from cdm_toolkit.alignment.aligners import ALIGNERS
from cdm_toolkit.errors import BadRunConfig

MethodName = Literal["cdm", "sft"]
Positions = Literal["boundary", "mean"]
DType = Literal["float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda", "mps"]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup"]

_AT_LEAST_1 = ("top_k", "batch_size", "grad_accumulation", "log_every", "workers")
_NOT_NEGATIVE = ("warmup_steps", "weight_decay", "save_every", "teacher_memory", "seed")
_POSITIVE = ("temperature", "learning_rate", "epochs", "max_grad_norm")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "method": get_args(MethodName),
    "positions": get_args(Positions),
    "aligner": ALIGNERS,
    "dtype": get_args(DType)[:2],
    "teacher_dtype": get_args(DType),
    "schedule": get_args(Schedule),
    "device": get_args(Device),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Settings of one run. Raises BadRunConfig with all faults at once.

    `paper` gives the paper's; the defaults are this toolkit's.
    """

    student: str
    data: str
    output: str
    teacher: str | None = None
    """Not looked at by `sft`."""

    method: MethodName = "cdm"
    alpha: float = 0.5
    """Weight of cross-entropy; KD has the rest."""
    temperature: float = 1.0
    top_k: int = 100
    """Candidates of each model at a position."""
    theta: float = 0.3
    """Neighbours have an edit distance below this part of their joint length."""
    positions: Positions = "boundary"
    aligner: str = "anchored"
    both_directions: bool = True
    """Take the neighbours of the student's ids too, not only those of the teacher's."""
    exact_always: bool = True
    """Pair a teacher's candidate with the same bytes on the student's side, even where these are not in the
    student's top k. Without it an untrained student has next to no pairs."""
    rest_bucket: bool = True
    """Take the unmatched probability as one more outcome: without it one pair alone teaches nothing."""
    guards: bool = True
    """Match no tokens whose digits or operators differ."""

    epochs: float = 1.0
    max_steps: int | None = None
    """Optimizer steps; goes before `epochs`."""
    batch_size: int = 8
    grad_accumulation: int = 1
    learning_rate: float = 2e-5
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 512
    """Tokens on either side."""
    seed: int = 0

    device: Device = "cpu"
    """cuda is the first GPU that this process sees; several are for `accelerate launch`."""
    dtype: DType = "float32"
    """bfloat16: mixed precision, with weights in float32."""
    teacher_dtype: DType = "float32"
    teacher_memory: int = 1024
    """MiB for what the teacher said about rows that come again in later epochs; 0 asks it anew."""
    workers: int = 1
    """Processes that build the neighbour table."""

    log_every: int = 10
    save_every: int = 500
    """Steps between checkpoints; 0 writes none."""
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if faults := list(_faults(self)):
            raise BadRunConfig("the run", faults)

    @property
    def uses_teacher(self) -> bool:
        return self.method != "sft"


def paper(**settings: Any) -> DistillConfig:
    """Make a config with the paper's settings (arXiv 2502.11104, section 4.1), and the given ones."""
    preset: dict[str, Any] = {
        "alpha": 0.9,
        "temperature": 0.8,
        "top_k": 100,
        "theta": 0.3,
        "aligner": "entropy-dtw",
        "positions": "mean",
        "rest_bucket": False,
        "guards": False,
        "exact_always": False,
    }
    return from_mapping(preset | settings)


def from_mapping(settings: Mapping[str, Any], *, source: str = "the run") -> DistillConfig:
    """Make a config of named settings, such as a run file's. Unknown names are faults as well."""
    known = [field.name for field in fields(DistillConfig)]
    faults = []
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            faults.append(f"{name} is no setting" + (f", did you mean {near[0]}?" if near else ""))
    faults += [f"{name} is missing" for name in ("student", "data", "output") if name not in settings]
    if faults:
        raise BadRunConfig(source, faults)
    return DistillConfig(**settings)


def _faults(config: DistillConfig) -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        expected = _TYPES[str(field.type)]
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            yield f"{field.name} is {value!r}, not {' or '.join(t.__name__ for t in expected)}"
        else:
            yield from _value_faults(config, field.name, value)


def _value_faults(config: DistillConfig, name: str, value: Any) -> Iterator[str]:
    if name in _CHOICES and value not in _CHOICES[name]:
        near = get_close_matches(value, _CHOICES[name], n=1)
        yield f"{name} is {value!r}, not one of {', '.join(_CHOICES[name])}" + (
            f" (did you mean {near[0]}?)" if near else ""
        )
    elif name in _AT_LEAST_1 and value < 1:
        yield f"{name} is {value}, it must be at least 1"
    elif name in _NOT_NEGATIVE and not 0 <= value < math.inf:
        yield f"{name} is {value}, it must not be negative"
    elif name in _POSITIVE and not 0 < value < math.inf:
        yield f"{name} is {value}, it must be more than 0"
    elif name == "alpha" and not 0 <= value <= 1:
        yield f"alpha is {value}, it must be from 0 to 1"
    elif name == "theta" and not 0 < value < 1:
        yield f"theta is {value}, it must be between 0 and 1"
    elif name == "max_steps" and value is not None and value < 1:
        yield f"max_steps is {value}, it must be at least 1"
    elif name == "max_length" and value < 4:
        yield f"max_length is {value}, it must be at least 4"
    elif name in ("student", "data", "output") and not value:
        yield f"{name} is empty"
    elif name == "teacher" and config.method != "sft" and not value:
        yield f"teacher is missing, {config.method} needs one"
    elif name == "resume" and value and config.overwrite:
        yield "overwrite and resume are both set, give one of them"


_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "MethodName": (str,),
    "Positions": (str,),
    "DType": (str,),
    "Schedule": (str,),
    "Device": (str,),
    "float": (float, int),
    "int": (int,),
    "int | None": (int, type(None)),
    "bool": (bool,),
}
