"""Settings of a run: frozen records, from a run file, flags or Python, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cdm_toolkit.artifacts.settings import (
    Count,
    CountOrNone,
    NotNegative,
    Positive,
    Settings,
    Share,
    Text,
    make,
    one_or_several,
    read_yaml,
    with_settings,
)
from cdm_toolkit.distill.teacher_settings import ACROSS_TOKENIZERS, Server, TeacherConfig
from cdm_toolkit.errors import UnknownName
from cdm_toolkit.hub.models import resolve_device, resolve_dtype
from cdm_toolkit.kd.method import find_method
from cdm_toolkit.kd.rows import Learn
from cdm_toolkit.kd.settings import Fault, Faults, fields_of
from cdm_toolkit.kd.tokenized_rows import TemplateName

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


class _Reading(Settings):
    """How a source is read."""

    config: Text | None = None
    """Of the data set on the hub, where it has several."""
    split: Text = "train"
    """Of the data set on the hub."""
    tokenizer: Text | None = None
    """Of rows that are token ids (`input_ids`), as a set of DistillKit has them: the tokenizer that made the ids; a
    teacher of kind distillkit tells it."""
    columns: dict[Text, Text] | None = None
    """Where columns are named otherwise: `{prompt: ours, completion: theirs}`; columns that are not named are not
    read."""
    learn: Learn = "all"
    """all: each answer of the assistant in a chat. last: the last one alone. Calls of tools are read, never learned."""
    limit: Count | None = None
    """Read so many rows at most."""
    shuffle: bool = False
    """Take the rows of `limit` from all over the data, by the seed, in place of the first."""
    weight: Positive = 1.0
    """How often an epoch has each row: 2 twice, 0.5 half of the rows, chosen anew in each epoch."""
    alpha: Share | None = None
    """Weight of cross-entropy for these rows, in place of the run's: 0 leaves a text to the teachers alone."""

    @model_validator(mode="after")
    def _ids_have_their_names(self) -> Self:
        if self.tokenizer is not None and self.columns is not None:
            raise ValueError("columns is of no use to rows that are token ids")
        return self


class SourceConfig(_Reading):
    """A source of rows: files, or a data set on the hub."""

    path: Text
    """A file, a pattern or a data set on the hub, as `data.path`."""


class _Rows(_Reading):
    """Rows of one source, or of several `sources`."""

    path: Text | None = None
    """A file (JSONL, JSON, CSV, parquet, arrow), a pattern such as `data/*.parquet`, or a data set on the hub such
    as `org/set` or `org/set@revision`; `sample:train` is the package's own. Rows have prompt and completion, question
    and answer, messages, conversations, instruction and output, or text."""
    sources: tuple[SourceConfig, ...] = ()
    """Several in place of `path`, each with what is said of it."""

    @model_validator(mode="after")
    def _isone_or_several(self) -> Self:
        beside = self.model_fields_set & SourceConfig.model_fields.keys()
        if self.sources and beside:
            raise ValueError(f"{', '.join(sorted(beside))} beside sources: put it into each of them")
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Give the sources, also where there is one."""
        if self.sources or self.path is None:
            return self.sources
        return (SourceConfig(path=self.path, **self.model_dump(include=set(_Reading.model_fields))),)

    @property
    def name(self) -> str:
        """Name the sources for messages."""
        return ", ".join(source.path for source in self.all_sources)


class DataConfig(_Rows):
    """The rows to train on: one source, or several `sources`."""

    max_length: Annotated[int, Field(ge=4)] = 512
    """Tokens of a row on any side; more are cut at a shared boundary."""
    template: TemplateName = "none"
    """chat: each side reads a row through its own chat template."""
    workers: Count = 1
    """Processes that tokenize and align."""

    @model_validator(mode="after")
    def _has_rows(self) -> DataConfig:
        if not self.all_sources:
            raise ValueError("path is missing, or sources")
        return self


class EvalConfig(_Rows):
    """The rows to evaluate on while the student trains, which are not trained on: one source, several `sources`, or a
    `share` of the data."""

    path: Text | None = None
    """Rows that are held out of training, to evaluate the student on while it trains: as `data.path`."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of the data's rows, in place of others; `limit` goes with it. They are chosen by their text, so that the choice
    stays when rows are added, and rows of one text stay together."""
    every: Count = 100
    """Steps between two evaluations; there is one at the end too. The best so far is kept as a checkpoint, and its
    weights are written as the student."""
    patience: Count | None = None
    """Stop after so many evaluations without a better one; never unless it is set."""
    metric: Literal["loss", "ce", "bits_per_byte"] = "loss"
    """What the best has least of: the objective (loss), CE, or bits per byte."""

    @model_validator(mode="after")
    def _has_rows(self) -> EvalConfig:
        beside = self.model_fields_set & (_Rows.model_fields.keys() - {"limit"})
        if self.share is not None and beside:
            raise ValueError(f"{', '.join(sorted(beside))} beside share: that is of the data's own rows")
        if self.share is None and not self.all_sources:
            raise ValueError("path is missing, or sources, or a share of the data")
        if any(source.weight != 1 for source in self.all_sources):
            raise ValueError("weight is of no use: each row is evaluated once")
        return self


OF_A_SERVER_THAT_SAMPLES = {"url", "weights", "api_key_env", "in_flight", "timeout", "patience"}
"""Settings of engine vllm; none of them decides what is sampled."""


class OnPolicyConfig(Settings):
    """Let the student sample completions of the data's prompts, and learn from what the teachers say of these
    (on-policy distillation: GKD, arXiv 2306.13649). CE is of the data's own completions alone."""

    share: Share = 0.5
    """Of the rows of a step, those whose completion the student samples; the others are learned as they are."""
    max_new_tokens: Count = 256
    """Of a sample, in the student's tokens. One that is cut there, or at `data.max_length`, teaches no end."""
    temperature: NotNegative = 1.0
    """Of sampling; 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens whose probability reaches this in all."""
    samples_per_prompt: Count = 1
    """Of each prompt; the rows of a batch stay as many, so that it has fewer prompts."""
    buffer_steps: Count = 1
    """Steps whose samples are drawn together, from the student as it is before the first: more at once is faster, and
    the later ones are of an earlier student."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: `generate` in the run's own processes, or a vLLM server that reads the student's weights anew
    before each draw."""
    url: Server | None = None
    """Of engine vllm: the server, such as http://localhost:8000."""
    weights: Text | None = None
    """Of engine vllm: folder that the student's weights are written to, and that the server sees under the same path;
    in the output folder unless given."""
    api_key_env: Text | None = None
    """Of engine vllm: name of the environment variable that holds the server's key, where it asks for one."""
    in_flight: Count = 64
    """Of engine vllm: requests that are open at once, in each process; the server makes batches of them."""
    timeout: Positive = 600.0
    """Of engine vllm: seconds after which a sample, or the reading of weights, is given up, and asked for again."""
    patience: Positive = 300.0
    """Of engine vllm: seconds to wait for a server that fails, before the run stops with a checkpoint."""

    @property
    def sampling_options(self) -> dict[str, Any]:
        """Give what decides which texts are sampled, and when."""
        return self.model_dump(exclude={"engine", *OF_A_SERVER_THAT_SAMPLES})

    @model_validator(mode="after")
    def _has_a_server(self) -> OnPolicyConfig:
        if self.engine == "vllm":
            if self.url is None:
                raise Faults([Fault("url", "is missing: engine vllm needs the address of its server")])
        elif given := sorted(self.model_fields_set & OF_A_SERVER_THAT_SAMPLES):
            raise Faults(
                [Fault(name, "is of engine vllm: set `engine: vllm`, or leave it out") for name in given]
            )
        return self


class LoraConfig(Settings):
    """Train low-rank adapters (arXiv 2106.09685) in place of the weights; they are merged in at the end."""

    rank: Count = 16
    """Of the two matrices that are trained for each weight."""
    alpha: Positive = 32.0
    """Scale: their product counts alpha / rank times."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of their inputs that is dropped in training."""
    targets: tuple[Text, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get adapters; all-linear: every linear layer but the last."""


class TrainConfig(Settings):
    """How the student is trained; most are `transformers.TrainingArguments` under shorter names."""

    lr: Positive = 2e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Of the learning rate after the warm-up."""
    warmup_steps: CountOrNone = 0
    """Optimizer steps in which the learning rate rises to its peak."""
    epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: Count | None = None
    """Optimizer steps; goes before epochs."""
    batch_size: Count = 8
    """Rows per batch and device."""
    batch_tokens: Count | None = None
    """About so many tokens in a batch, padding included, on the side that has the most, in place of `batch_size`."""
    pack: bool = False
    """Lay the rows of a batch end to end in place of padding them; positions and attention restart at each row."""
    grad_accumulation: Count = 1
    """Batches per optimizer step."""
    weight_decay: NotNegative = 0.0
    """Of AdamW."""
    max_grad_norm: Positive = 1.0
    """Norm to which the gradient of a step is clipped."""
    group_by_length: bool = True
    """Batch rows of similar length."""
    seed: CountOrNone = 0
    """Of all that is random: the order of the rows, adapters, dropout."""

    device: DeviceName = "auto"
    """auto: a GPU where there is one, else the CPU. cuda is the first GPU that this process sees; several are for
    `accelerate launch`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: mixed precision. auto: bfloat16 on a GPU that computes in it, else float32."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Of the student in training; bfloat16 takes half the memory, and rounds small updates away."""
    attn_implementation: Text | None = None
    """Of the student and the teachers in memory: sdpa, eager, flash_attention_2, … as transformers names them; sdpa
    where the model has it unless it is set."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the student's layers with torch.compile."""
    lora: LoraConfig | None = None
    """Train adapters in place of the weights."""

    log_every: Count = 10
    """Steps between two entries of the log."""
    save_every: CountOrNone = 500
    """Steps between checkpoints; 0 writes none."""
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(one_or_several)] = ()
    """Where the log goes besides: tensorboard writes event files to the output folder's `runs`."""
    trainer: dict[Text, Any] | None = None
    """Other fields of `transformers.TrainingArguments`, such as `{optim: adamw_8bit, torch_empty_cache_steps: 50}`."""

    @property
    def mixed_dtype(self) -> str:
        """Name the dtype that `dtype` stands for on this machine."""
        return resolve_dtype(self.dtype, self.torch_device)

    @property
    def hub_repository(self) -> str | None:
        """Name the repository on the hub that the student goes to at the end, where `trainer` asks for that."""
        trainer = self.trainer or {}
        return trainer.get("hub_model_id") if trainer.get("push_to_hub") else None

    @property
    def torch_device(self) -> str:
        """Name the device that `device` stands for on this machine. BadOption for one that is not here."""
        return str(resolve_device(self.device))


class DistillConfig(Settings):
    """One run. Without a teacher it is supervised fine-tuning."""

    student: Text
    """The model to train: an alias, a folder or a hub id."""
    data: DataConfig
    """The rows to train on."""
    output: Text
    """Folder to write."""
    teachers: tuple[TeacherConfig, ...] = ()
    """What the student learns from besides the labels."""
    alpha: Share = 0.8
    """Weight of cross-entropy; KD has the rest. Ignored without a teacher."""
    train: TrainConfig = TrainConfig()
    """How it is trained."""
    on_policy: OnPolicyConfig | None = None
    """Learn from texts that the student samples; from the data alone unless it is set."""
    eval: EvalConfig | None = None
    """What it is evaluated on while it trains; nothing unless it is set."""

    @model_validator(mode="after")
    def _samples_are_there(self) -> DistillConfig:
        share = self.on_policy.share if self.on_policy is not None else 0.0
        for teacher in self.teachers:
            if teacher.method_class.samples_alone and share < 1:
                raise ValueError(
                    f"method {teacher.method} learns from samples of the student alone: give on_policy.share 1, or "
                    "another method, such as spelling with divergence: reverse-kl"
                )
        return self

    @model_validator(mode="after")
    def _samples_can_be_judged(self) -> DistillConfig:
        if self.on_policy is None:
            return self
        if not self.teachers:
            raise ValueError("on_policy is of no use without a teacher, who judges the samples")
        if self.train.batch_tokens is not None:
            raise ValueError("train.batch_tokens counts tokens of the data, not of samples: give batch_size")
        for teacher in self.teachers:
            if teacher.kind in ("cached", "distillkit"):
                raise ValueError(
                    f"on_policy needs teachers that can be asked about new texts, of kind local or served: "
                    f"{teacher.model} is {teacher.kind}"
                )
            if teacher.entropy == "models":
                raise ValueError(
                    "on_policy is not for entropy: models, which is computed from the data before training"
                )
        return self

    @model_validator(mode="after")
    def _teachers_know_the_rows(self) -> DistillConfig:
        if self.eval is None or self.eval.metric != "loss":
            return self
        for teacher in self.teachers:
            if teacher.method_class.samples_alone:
                raise ValueError(
                    f"eval.metric is loss, and {teacher.method} says nothing of held-out rows: give ce or bits_per_byte"
                )
        cached = [teacher.model for teacher in self.teachers if teacher.kind in ("cached", "distillkit")]
        if self.eval.share is None and cached:
            raise ValueError(
                f"eval.metric is loss, which has the KD of {cached[0]}, which knows none of these rows: "
                "give ce or bits_per_byte, or a share of the data in place of other rows"
            )
        return self

    @model_validator(mode="after")
    def _set_is_the_data(self) -> DistillConfig:
        names = [teacher.tokenizer_name for teacher in self.teachers if teacher.kind == "distillkit"]
        if not names:
            return self
        if len(names) > 1:
            raise ValueError("teachers has several of kind distillkit: the rows are the set of one")
        if len(self.data.all_sources) != 1:
            raise ValueError(
                "data has several sources: with a teacher of kind distillkit it is one set alone"
            )
        if self.data.all_sources[0].columns is not None:
            raise ValueError("data.columns is of no use to a set of DistillKit's")
        if self.data.tokenizer not in (None, names[0]):
            raise ValueError(
                f"data.tokenizer is {self.data.tokenizer}, and that of the set's teacher {names[0]}"
            )
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Give the sources of the data; a set of DistillKit's is read with the tokenizer of its teacher."""
        names = [teacher.tokenizer_name for teacher in self.teachers if teacher.kind == "distillkit"]
        if not names:
            return self.data.all_sources
        (source,) = self.data.all_sources
        return (source.model_copy(update={"tokenizer": names[0]}),)

    @property
    def ce_weight(self) -> float:
        return self.alpha if self.teachers else 1.0


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "alpha": 0.9,
        "teacher": {
            "method": "cdm",
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
    """Make a config of a run file's content. Raises BadSettings with all faults at once.

    Beside the record's own names it takes `preset`, whose settings go under the given ones, and a path or a list of
    sources in place of the records `data` and `eval`.
    """
    given = dict(settings)
    preset = given.pop("preset", None)
    given |= {name: _as_record(given[name]) for name in ("data", "eval") if name in given}
    return make(DistillConfig, _over_preset(given, preset) if preset is not None else given, source=source)


def _as_record(rows: Any) -> Any:
    """Make the record of rows of which the path is given, or a list of sources."""
    if isinstance(rows, str):
        return {"path": rows}
    if isinstance(rows, Sequence):
        return {"sources": [{"path": one} if isinstance(one, str) else one for one in rows]}
    return rows


def from_file(path: Path, assignments: Sequence[str] = ()) -> DistillConfig:
    """Make a config of a run file, with assignments such as `train.lr=2e-5` over it."""
    return from_mapping(
        with_settings(read_yaml(path), assignments, source="the assignments"), source=str(path)
    )


def _over_preset(given: dict[str, Any], name: Any) -> dict[str, Any]:
    """Lay a run's settings over a preset's; a teacher takes what its method has a use for."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UnknownName("preset", str(name), list(PRESETS))
    preset = PRESETS[name]
    teachers = given.get("teachers")
    if isinstance(teachers, list):
        given["teachers"] = [_teacher_over(teacher, preset["teacher"]) for teacher in teachers]
    return {"alpha": preset["alpha"]} | given


def _teacher_over(teacher: Any, preset: Mapping[str, Any]) -> Any:
    if not isinstance(teacher, Mapping):
        return teacher  # a fault, which is listed with the others
    try:
        method = find_method(str(teacher.get("method", preset["method"])))
    except UnknownName:
        return teacher
    options = {"method", *(field.name for field in fields_of(method.Settings))}
    options |= set() if method.same_tokenizer else set(ACROSS_TOKENIZERS)
    under = {name: value for name, value in preset.items() if name in options}
    if teacher.get("aligner", "entropy-dtw") != "entropy-dtw":
        under.pop("entropy", None)
    return under | dict(teacher)
