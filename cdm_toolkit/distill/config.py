"""What a run is told to do: frozen records, from a run file, flags or Python, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cdm_toolkit.artifacts.settings import Settings, make, read_yaml, with_settings
from cdm_toolkit.errors import UnknownName

MethodName = Literal["cdm", "em", "mined", "prefix", "uld", "alm", "gold", "kl", "reverse-kl", "jsd"]
Positions = Literal["boundary", "mean"]
TemplateName = Literal["none", "chat"]

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Open = Annotated[float, Field(gt=0, lt=1)]

CANDIDATES = 100
"""Of each model at a position, where a run does not say how many."""

_ACROSS = {"aligner", "entropy"}
_OPTIONS: Mapping[str, set[str]] = {
    "cdm": _ACROSS | {"mapping", "temperature", "top_k", "rest_bucket", "both_directions", "inside"},
    "cdm-near": _ACROSS
    | {
        "mapping",
        "temperature",
        "top_k",
        "positions",
        "rest_bucket",
        "max_edit_distance",
        "match_digits",
        "both_directions",
        "exact_always",
    },
    "em": _ACROSS | {"temperature", "top_k", "positions", "rest_bucket"},
    "mined": _ACROSS | {"temperature", "top_k", "positions", "rest_bucket", "match_digits"},
    "prefix": _ACROSS | {"temperature", "top_k", "positions", "rest_bucket"},
    "uld": _ACROSS | {"temperature", "top_k", "positions"},
    "alm": _ACROSS | {"tau"},
    "gold": _ACROSS | {"temperature", "top_k", "beta"},
    "kl": {"temperature", "top_k"},
    "reverse-kl": {"temperature", "top_k"},
    "jsd": {"temperature", "top_k", "beta"},
}
"""What each method looks at; another option that is set for it is a fault, not ignored."""


class TeacherConfig(Settings):
    """A teacher, with what is learned from it and how. A method without use for an option refuses it."""

    model: Text
    """An alias, a folder or a hub id."""
    method: MethodName = "cdm"
    weight: Positive = 1.0
    """Of this teacher's KD among all."""
    cache: Text | None = None
    """Folder of `cdm teacher cache`, instead of the model in memory."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights of the model in memory."""

    mapping: Literal["spelled", "near"] = "spelled"
    """What `cdm` pairs with a teacher's candidate at each position. spelled: the student token that its bytes go
    on with there, at each token of a group. near: the paper's, the nearest of the student's candidates by edit
    distance."""
    inside: bool = True
    """Teach the student's tokens inside a group too, not only those at shared boundaries."""
    aligner: Literal["anchored", "bytes", "entropy-dtw", "dtw"] = "anchored"
    entropy: Literal["uniform", "models"] = "uniform"
    """What weighs tokens in DTW: nothing, or the entropies of both models' predictions (a pass of each over the
    data)."""
    positions: Positions = "boundary"
    """Which logits speak for a group: those at the shared boundary before it, or the mean over its tokens."""
    temperature: Positive = 1.0
    top_k: Count | None = None
    """Candidates of each model at a position. Where it is not set 100, or what a vocabulary or a cache has if it
    has fewer."""
    rest_bucket: bool = True
    """Take the unmatched probability as one more outcome: without it one pair alone teaches nothing."""
    max_edit_distance: Open = 0.3
    """Neighbours have an edit distance below this part of their joint length."""
    match_digits: bool = True
    """Match no tokens whose digits or operators differ."""
    both_directions: bool = True
    """Look from the student's candidates too, not only from the teacher's."""
    exact_always: bool = True
    """Pair a teacher's candidate with the same bytes on the student's side, even where these are not in the
    student's top k. Without it an untrained student has next to no pairs."""
    beta: Open = 0.5
    """Of the generalised JSD: near 0 it is like KL, near 1 like reverse KL."""
    tau: Positive = 100.0
    """Temperature of the likelihoods of whole groups."""

    @property
    def candidates(self) -> int:
        """Count the candidates that are wanted at a position."""
        return self.top_k or CANDIDATES

    @property
    def options(self) -> dict[str, Any]:
        """Give what the method looks at, defaults included, in values that JSON has."""
        looked_at = self.model_dump(mode="json", include=_OPTIONS[self.variant])
        more = {"top_k": self.candidates} if "top_k" in looked_at else {}
        return {"method": self.method} | looked_at | more

    @property
    def variant(self) -> str:
        """Name the method, the mapping of `cdm` included: a key of `losses.methods.METHODS`."""
        return _variant(self.method, self.mapping)

    @model_validator(mode="after")
    def _fits_the_method(self) -> TeacherConfig:
        options = set().union(*_OPTIONS.values())
        if extra := sorted((self.model_fields_set & options) - _OPTIONS[self.variant]):
            named = f"{self.method} with mapping {self.mapping}" if self.method == "cdm" else self.method
            near = self.variant == "cdm" and set(extra) <= _OPTIONS["cdm-near"]
            raise ValueError(
                f"{named} has no use for {', '.join(extra)}{', mapping near has' if near else ''}"
            )
        if self.cache and self.positions == "mean":
            raise ValueError("positions mean needs whole logits: leave the cache out, or take boundary")
        if self.entropy == "models" and self.aligner != "entropy-dtw":
            raise ValueError(f"aligner {self.aligner} has no use for entropy models, entropy-dtw has")
        return self


class DataConfig(Settings):
    """The rows to train on."""

    path: Text
    """JSONL with prompt and completion, question and answer, messages, or text in each row; `sample:train` is the
    package's own."""
    max_length: Annotated[int, Field(ge=4)] = 512
    """Tokens of a row on any side; more are cut at a shared boundary."""
    template: TemplateName = "none"
    """chat: each side reads a row through its own chat template."""
    workers: Count = 1
    """Processes that tokenize and align."""


class LoraConfig(Settings):
    """Train low-rank adapters (arXiv 2106.09685) in place of the weights; they are merged in at the end."""

    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[Text, ...] | Literal["all-linear"] = "all-linear"


class TrainConfig(Settings):
    """How the student is trained; most are `transformers.TrainingArguments` under shorter names."""

    lr: Positive = 2e-5
    """Learning rate at its highest."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: CountOrNone = 0
    epochs: Positive = 1.0
    max_steps: Count | None = None
    """Optimizer steps; goes before epochs."""
    batch_size: Count = 8
    """Rows a batch and device."""
    grad_accumulation: Count = 1
    """Batches a step."""
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    bucket: bool = True
    """Batch rows of like length."""
    seed: CountOrNone = 0

    device: Literal["cpu", "cuda", "mps"] = "cpu"
    """cuda is the first GPU that this process sees; several are for `accelerate launch`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision, with weights in float32."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the student's layers with torch.compile."""
    lora: LoraConfig | None = None

    log_every: Count = 10
    save_every: CountOrNone = 500
    """Steps between checkpoints; 0 writes none."""
    tensorboard: bool = False
    """Write event files to the output folder's `runs`."""


class DistillConfig(Settings):
    """One run. Without a teacher it is supervised fine-tuning."""

    student: Text
    """The model to train: an alias, a folder or a hub id."""
    data: DataConfig
    output: Text
    """Folder to write."""
    teachers: tuple[TeacherConfig, ...] = ()
    alpha: Share = 0.5
    """Weight of cross-entropy; KD has the rest. Without a teacher it is not looked at."""
    train: TrainConfig = TrainConfig()

    @property
    def ce_weight(self) -> float:
        return self.alpha if self.teachers else 1.0


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "alpha": 0.9,
        "teacher": {
            "mapping": "near",
            "temperature": 0.8,
            "top_k": 100,
            "max_edit_distance": 0.3,
            "aligner": "entropy-dtw",
            "entropy": "models",
            "positions": "mean",
            "rest_bucket": False,
            "match_digits": False,
            "exact_always": False,
        },
    }
}
"""Settings that go under a run's own: arXiv 2502.11104, section 4.1, for `paper`."""


def from_mapping(settings: Mapping[str, Any], *, source: str = "the run") -> DistillConfig:
    """Make a config of a run file's content. Raises BadRunConfig with all faults at once.

    Beside the record's own names it takes `preset`, whose settings go under the given ones, and a path in place
    of `data`'s record.
    """
    given = dict(settings)
    preset = given.pop("preset", None)
    if isinstance(given.get("data"), str):
        given["data"] = {"path": given["data"]}
    return make(DistillConfig, _over_preset(given, preset) if preset is not None else given, source=source)


def from_file(path: Path, assignments: Sequence[str] = ()) -> DistillConfig:
    """Make a config of a run file, with assignments such as `train.lr=2e-5` over it."""
    return from_mapping(with_settings(read_yaml(path), assignments, source="--set"), source=str(path))


def _over_preset(given: dict[str, Any], name: Any) -> dict[str, Any]:
    """Lay a run's settings over a preset's; a teacher takes what its method has a use for."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UnknownName("preset", str(name), list(PRESETS))
    preset = PRESETS[name]
    teachers = given.get("teachers")
    if isinstance(teachers, list):
        given["teachers"] = [_teacher_over(teacher, preset["teacher"]) for teacher in teachers]
    return {"alpha": preset["alpha"]} | given


def _variant(method: str, mapping: str) -> str:
    return "cdm-near" if method == "cdm" and mapping == "near" else method


def _teacher_over(teacher: Any, preset: Mapping[str, Any]) -> Any:
    method = teacher.get("method", "cdm") if isinstance(teacher, Mapping) else None
    if not isinstance(method, str):
        return teacher  # a fault, which is listed with the others
    variant = _variant(method, teacher.get("mapping", preset["mapping"]))
    options = _OPTIONS.get(variant, set())
    under = {name: value for name, value in preset.items() if name in options}
    if teacher.get("aligner", "entropy-dtw") != "entropy-dtw":
        under.pop("entropy", None)
    return under | teacher
