"""Studies: which methods are compared, on which models and text, what all have in common, and which runs these are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from cdm_toolkit.artifacts.settings import (
    Count,
    CountOrNone,
    Settings,
    Share,
    Text,
    make,
    read_yaml,
    with_settings,
)
from cdm_toolkit.artifacts.shipped import given_file, shipped_folder
from cdm_toolkit.compare.types import RINGS, Cell, Ring
from cdm_toolkit.distill.settings import (
    PRESETS,
    DataConfig,
    DistillConfig,
    OnPolicyConfig,
    SourceConfig,
    TrainConfig,
    from_mapping,
)
from cdm_toolkit.distill.teacher_settings import DEFAULT_METHOD, TeacherConfig
from cdm_toolkit.errors import BadOption, BadSettings, UnknownName
from cdm_toolkit.kd.settings import Fault, Faults

MEASURES = ("bits-per-byte", "divergence", "time", "memory")
"""What can be asked for; all but the divergence cost nothing, and are always there."""
Seeds = Annotated[tuple[CountOrNone, ...], Field(min_length=1)]

_NAME = re.compile(r"\w[\w .,=+-]*")
"""What may name a method or a study: it is a part of file names."""
_OWNED: Mapping[str, str] = {
    "max_steps": "steps",
    "epochs": "steps",
    "seed": "seeds",
    "save_every": "no checkpoints",
    "report_to": "its own log",
    "group_by_length": "one order of rows for all methods",
}
"""Settings of training that the study itself decides, and what it has for them."""


class TextConfig(Settings):
    """Text of one kind, to train or to measure on."""

    path: Text
    """python:code, python:docstrings, python:manual, python:headers, sample:train, sample:heldout, or JSONL as
    `cdm distill` reads it."""
    rows: Count | None = None
    """The first so many; all without it."""
    skip: CountOrNone = 0
    """Pass over so many before these."""
    split: Literal["train", "heldout"] = "train"
    """Which part of a kind that starts with python: the other one has other files."""


class StudentConfig(Settings):
    """The model that every cell starts from: one that is there, or one that is made for the study.

    A name alone is a `model`.
    """

    model: Text | None = None
    """An alias, a folder or a hub id."""
    transplant: Text | None = None
    """A trained model that is given the vocabulary of `tokenizer`, fewer `layers`, or both."""
    size: Text | None = None
    """Parameters, about, of a fresh model with the vocabulary of `tokenizer`: 10m, 135m."""
    tokenizer: Text | None = None
    entries: Count | None = None
    """Cut that vocabulary to so many ids."""
    layers: Count | None = None
    """Keep so many layers of a transplanted model, those of greatest block influence."""
    data: TextConfig = TextConfig(path="sample:train")
    """Text on which that, and the mean hidden state for rows of new tokens, is measured."""
    embeddings: Literal["mean", "omp"] = "mean"
    """How a transplanted model gets rows of new tokens: means of old rows, or combinations after those of a `donor`."""
    donor: Text | None = None
    """A trained model with the new vocabulary."""
    seed: CountOrNone = 0
    """Of what is random in making it: the same for all cells."""

    @model_validator(mode="before")
    @classmethod
    def _from_a_name(cls, given: Any) -> Any:
        return {"model": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> StudentConfig:
        ways = [name for name in ("model", "transplant", "size") if getattr(self, name) is not None]
        if len(ways) != 1:
            got = " and ".join(ways) or "none of them"
            raise ValueError(f"give a model, or transplant or size with a tokenizer: it has {got}")
        self._check_extras(ways[0])
        return self

    def _check_extras(self, way: str) -> None:
        """Check the settings of how the student is made."""
        of_transplant = ("layers", "data", "embeddings", "donor")
        no_use = {"model": ("tokenizer", "entries", "seed", *of_transplant), "size": of_transplant}
        if extra := [name for name in no_use.get(way, ()) if name in self.model_fields_set]:
            whose = "a model that is there" if way == "model" else "a fresh model"
            raise ValueError(f"{whose} has no use for {', '.join(extra)}")
        if way == "size" and self.tokenizer is None:
            raise ValueError("size needs a tokenizer")
        if way == "transplant" and self.tokenizer is None and self.layers is None and self.donor is None:
            raise ValueError("transplant needs a tokenizer, a donor or a number of layers")
        if (self.embeddings == "omp") != (self.donor is not None):
            raise ValueError("embeddings: omp and a donor go together")

    @property
    def words(self) -> str:
        """Name the student for a heading."""
        if self.model is not None:
            return self.model
        body = self.transplant if self.transplant is not None else f"a fresh model of {self.size}"
        layers = "" if self.layers is None else f" ({self.layers} layers)"
        owner = self.tokenizer or self.donor
        tokenizer = "" if owner is None else f" with {owner}'s tokenizer"
        entries = "" if self.entries is None else f" ({self.entries:,} entries)"
        return f"{body}{layers}{tokenizer}{entries}"


class ContinuationsConfig(Settings):
    """Greedy continuations of held-out prompts."""

    rows: Count = 4
    """The first so many of each kind."""
    new_tokens: Count = 48
    """The most that a model adds, in its own tokens."""


class SuiteConfig(Settings):
    """An eval suite that every cell is scored on."""

    limit: Count | None = None
    """Score only the first rows."""
    data: Text | None = None
    """JSONL to score instead of the suite's own data."""
    allow_code_execution: bool = False
    """Run programs that a model writes, in a sandbox."""


class MethodConfig(Settings):
    """An entry of a study's methods: `method`, its settings and those of its alignment, and the fields here."""

    model_config = ConfigDict(extra="allow")

    preset: Text | None = None
    """Settings that go under the entry's own: paper."""
    alpha: Share | None = None
    """Weight of cross-entropy; the preset's or the study's without it."""
    seeds: Seeds | None = None
    """The study's without it."""
    steps: Count | None = None
    """The study's without it. What a student samples is longer or shorter than rows: equal tokens want other steps."""
    on_policy: OnPolicyConfig | None = None
    """Learn from texts that the student samples, as `on_policy` of a run: the teacher is then in memory."""

    @model_validator(mode="before")
    @classmethod
    def _differs_in_method_alone(cls, given: Any) -> Any:
        if given is None:  # what YAML has after a name and a colon
            return {}
        if isinstance(given, Mapping) and (shared := [name for name in given if name in _shared_names()]):
            raise ValueError(
                f"{', '.join(shared)}: the cells of a study share data, teacher and student; "
                "set it for the whole study, or leave it out"
            )
        return given

    @model_validator(mode="after")
    def _is_a_method(self) -> MethodConfig:
        given = self._given
        if "weight" in given:
            raise Faults([Fault("weight", "is no setting of a study: there is one teacher")])
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(_not_known("preset", self.preset, PRESETS))
        if not self.has_teacher:
            if given:
                raise ValueError(f"{', '.join(given)} is of a method: name it, such as method: spelling")
            if self.alpha is not None:
                raise ValueError("alpha has no use without a method: all is cross-entropy")
            if self.on_policy is not None:
                raise ValueError("on_policy has no use without a method: nobody judges the samples")
            return self
        if self.on_policy is not None and self.on_policy.engine != "transformers":
            problem = "is vllm: a server has one student, and each cell its own; give transformers"
            raise Faults([Fault("on_policy.engine", problem)])
        try:
            self.resolved()
        except BadSettings as error:
            raise Faults([_without_teacher(fault) for fault in error.faults]) from None
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether it is more than supervised fine-tuning."""
        return self.preset is not None or "method" in self._given

    @property
    def _given(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def resolved(self) -> tuple[dict[str, Any], float | None]:
        """Give the teacher's settings with the preset under them, without a model, and the entry's own alpha.

        The settings are empty for supervised fine-tuning. Raises BadSettings where the method has no use for one.
        """
        if not self.has_teacher:
            return {}, 1.0
        run: dict[str, Any] = dict.fromkeys(("student", "data", "output"), "-")
        run |= {"teachers": [{"model": "-"} | self._given]}
        if self.on_policy is not None:
            run["on_policy"] = self.on_policy.model_dump(exclude_unset=True)
        run |= {name: value for name in ("preset", "alpha") if (value := getattr(self, name)) is not None}
        config = from_mapping(run, source="it")
        teacher = config.teachers[0].model_dump(exclude_unset=True, exclude={"model"})
        return teacher, config.alpha if "alpha" in config.model_fields_set else None

    def options(self) -> dict[str, Any]:
        """Give all that makes the method what it is, defaults included; nothing for supervised fine-tuning."""
        teacher, _ = self.resolved()
        if not teacher:
            return {}
        found = TeacherConfig.model_validate({"model": "-"} | teacher).options
        return found if self.on_policy is None else found | {"on_policy": self.on_policy.sampling_options}

    @property
    def uses_cache(self) -> bool:
        """Whether its teacher can be a cache: means of whole logits and samples need the model."""
        teacher, _ = self.resolved()
        in_memory = self.on_policy is not None or teacher.get("positions", "boundary") != "boundary"
        return bool(teacher) and not in_memory

    def default_options(self) -> dict[str, Any]:
        """Give the options that its method has where nothing is set."""
        teacher, _ = self.resolved()
        if not teacher:
            return {}
        return TeacherConfig(model="-", method=teacher.get("method", DEFAULT_METHOD)).options


def _without_teacher(fault: str) -> Fault:
    """Take the run's name for an entry's setting off a fault."""
    name, _, problem = fault.removeprefix("teachers.0.").partition(" ")
    return Fault(name, problem)


_OF_ALL = {"model", "cache", "dtype"}
"""Settings of a teacher that are no method's: all cells share one teacher and its cached log-probabilities."""


class StudyConfig(Settings):
    """One study: all methods on one teacher, one student and the same rows, steps and seeds."""

    name: Text
    """That of its file without it."""
    about: str = ""
    teacher: Text
    """An alias, a folder or a hub id."""
    student: StudentConfig
    train: Annotated[Mapping[str, TextConfig], Field(min_length=1)]
    """Kinds of text to train on, mixed."""
    inside: Mapping[str, TextConfig] = {}
    """Held-out text of these kinds."""
    near: Mapping[str, TextConfig] = {}
    """Text of other kinds that are near these."""
    outside: Mapping[str, TextConfig] = {}
    """Text of kinds that are far from these."""
    max_length: Annotated[int, Field(ge=4)] = 512
    """Tokens of a row to train on, on any side: a longer one is passed over, since methods would cut it in
    different positions."""
    steps: Count
    seeds: Seeds = (0,)
    run: TrainConfig = TrainConfig()
    """Of training, for all cells."""
    teacher_run: TrainConfig | None = None
    """Train the teacher on the rows first, by cross-entropy, for the study's steps: its settings of training. None, as
    it is without it, lets it teach as it is."""
    threads: Count = 1
    """Of a cell: with as many, a cell that is run again gives the same bits."""
    measures: tuple[Text, ...] = MEASURES
    continuations: ContinuationsConfig | None = None
    """None, as it is without it, lets no model continue anything."""
    suites: Mapping[str, SuiteConfig] = {}
    default: Text | None = None
    """The method that the others are compared with."""
    methods: Annotated[Mapping[str, MethodConfig], Field(min_length=1)]
    alpha: Share = 0.5
    """Weight of cross-entropy where neither the method nor its preset has one."""
    curves: Mapping[str, tuple[Share, ...]] = {}
    """Further alphas of a method, with its first seed alone; with all of its seeds for `select_alpha_on`."""
    select_alpha_on: Mapping[str, TextConfig] = {}
    """Other rows of held-out kinds: each method is judged at that of its alphas which does best on these."""

    @field_validator("measures")
    @classmethod
    def _can_be_measured(cls, measures: tuple[str, ...]) -> tuple[str, ...]:
        faults = [_not_known("measure", name, MEASURES) for name in measures if name not in MEASURES]
        if missing := [name for name in MEASURES if name not in (*measures, "divergence")]:
            faults.append(
                f"{', '.join(missing)} cannot be left out: only the divergence costs time to measure"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return measures

    @model_validator(mode="after")
    def _fits_together(self) -> StudyConfig:
        parts = (self._faults_of_names, self._faults_of_text, self._faults_of_run, self._faults_of_curves)
        if faults := [fault for part in parts for fault in part()]:
            raise ValueError("; ".join(faults))
        return self

    def _faults_of_names(self) -> Iterator[str]:
        for what, name in (("name", self.name), *(("methods", method) for method in self.methods)):
            if not _NAME.fullmatch(name):
                yield f"{what}: {name!r} is no name for a file: give letters, digits, blanks and . , = + - _"
        if self.default is not None and self.default not in self.methods:
            yield f"default: {_not_known('method', self.default, self.methods)}"
        several = {"seeds": self.seeds}
        several |= {f"methods.{name}.seeds": entry.seeds or () for name, entry in self.methods.items()}
        for where, seeds in several.items():
            if twice := _twice(seeds):
                yield f"{where} has {', '.join(map(str, twice))} twice: once is enough"

    def _faults_of_text(self) -> Iterator[str]:
        if not (self.inside or self.outside):
            yield "inside and outside are empty: name text to measure on"
        for kind in self.inside:
            if kind not in self.train:
                yield f"inside.{kind} is no kind that is trained on: {_not_known('kind', kind, self.train)}"
        for ring in ("near", "outside"):
            for kind in self.rings[ring]:
                if kind in self.train:
                    yield f"{ring}.{kind} is trained on: give it another name, or put it inside"
        for kind in self.near.keys() & self.outside.keys():
            yield f"near.{kind} is outside as well: give one of them another name"
        held_out = [kind for texts in self.rings.values() for kind in texts]
        for kind in self.select_alpha_on:
            if kind not in held_out:
                yield f"select_alpha_on.{kind} is not held out: {_not_known('kind', kind, held_out)}"
        if self.select_alpha_on and not self.curves:
            yield "select_alpha_on has nothing to choose from: give curves"

    def _faults_of_run(self) -> Iterator[str]:
        given = {"run": self.run.model_fields_set}
        if self.teacher_run is not None:
            given["teacher_run"] = self.teacher_run.model_fields_set - {"seed"}
        for where, names in given.items():
            for name in sorted(names & _OWNED.keys()):
                yield f"{where}.{name} is the study's own: it has {_OWNED[name]}"

    def _faults_of_curves(self) -> Iterator[str]:
        for name, alphas in self.curves.items():
            if name not in self.methods:
                yield f"curves: {_not_known('method', name, self.methods)}"
            elif not self.methods[name].has_teacher:
                yield f"curves.{name} has no teacher: its alpha is 1 and nothing else"
            elif twice := _twice((self.alpha_of(name), *alphas)):
                shown = ", ".join(f"{alpha:g}" for alpha in twice)
                yield f"curves.{name} has {shown} twice: the method's own alpha is a point of its line already"

    def alpha_of(self, method: str) -> float:
        """Give the weight of cross-entropy of a method as such."""
        own = self.methods[method].resolved()[1]
        return self.alpha if own is None else own

    def steps_of(self, method: str) -> int:
        """Give the steps of a method, its own or the study's."""
        return self.methods[method].steps or self.steps

    @property
    def rings(self) -> dict[Ring, Mapping[str, TextConfig]]:
        """Give all held-out text, inside first."""
        return {ring: getattr(self, ring) for ring in RINGS}

    @property
    def heldout(self) -> dict[str, Mapping[str, TextConfig]]:
        """Give all text to measure on, by the setting that names it."""
        return {**{str(ring): texts for ring, texts in self.rings.items()}, _SELECTION: self.select_alpha_on}

    @property
    def pair(self) -> str:
        trained = "" if self.teacher_run is None else ", trained on the rows,"
        return f"{self.teacher}{trained} → {self.student.words}"

    @property
    def rows_per_step(self) -> int:
        return self.run.batch_size * self.run.grad_accumulation


_SELECTION = "select_alpha_on"


def heldout_name(setting: str, kind: str) -> str:
    """Name a kind of text among all that is measured: rows to choose alpha on are of the same kinds as others.

    >>> heldout_name("inside", "code"), heldout_name("select_alpha_on", "code")
    ('code', 'select_alpha_on: code')
    """
    return f"{setting}: {kind}" if setting == _SELECTION else kind


def _shared_names() -> set[str]:
    """List the settings of a run and of a study that are no method's own."""
    records = (StudyConfig, DistillConfig, TrainConfig, DataConfig)
    names = {name for record in records for name in record.model_fields} - SourceConfig.model_fields.keys()
    return (names | _OF_ALL) - MethodConfig.model_fields.keys()


def _not_known(kind: str, name: str, known: Iterable[str]) -> str:
    """Say what a name could have been, as UnknownName does."""
    return str(UnknownName(kind, name, list(known)))


def _twice(values: Sequence[Any]) -> list[Any]:
    return sorted({value for value in values if values.count(value) > 1})


# Cells


def grid(study: StudyConfig) -> tuple[Cell, ...]:
    """List the cells: every method with its first seed, then with the second and so on, then the lines over alpha.

    So that a study which is stopped early is still a comparison. The lines have the first seed of a method, or all
    where alpha is chosen among their points.
    """
    seeds = {name: entry.seeds or study.seeds for name, entry in study.methods.items()}
    turns = (zip(seeds, turn, strict=True) for turn in zip_longest(*seeds.values()))
    own = [
        (name, study.alpha_of(name), seed, False) for turn in turns for name, seed in turn if seed is not None
    ]
    curves = [
        (name, alpha, seed, True)
        for name, alphas in study.curves.items()
        for seed in seeds[name][: None if study.select_alpha_on else 1]
        for alpha in sorted(alphas)
    ]
    return tuple(Cell(index, *of_cell) for index, of_cell in enumerate(own + curves))


def cell_at(study: StudyConfig, which: int | str) -> Cell:
    """Find a cell by its number or its name. Raises BadOption."""
    cells = grid(study)
    for cell in cells:
        if str(which) in (str(cell.index), cell.name):
            return cell
    names = f"0 to {len(cells) - 1}, or a cell's name: `list_cells` shows what each is"
    raise BadOption("cell", which, names)


# Files


def list_studies() -> dict[str, Path]:
    """List the studies that come with the package: their files by name."""
    return {path.stem: path for path in sorted(shipped_folder("studies").glob("*.yaml"))}


def find_study(name: str) -> Path:
    """Find a study file by its path, or one that is shipped by its name. Raises FileProblem or UnknownName."""
    if (path := given_file(name)) is not None:
        return path
    if name not in (shipped := list_studies()):
        raise UnknownName("study", name, list(shipped))
    return shipped[name]


def from_file(name: str, assignments: Sequence[str] = ()) -> StudyConfig:
    """Read a study by path or name, with assignments such as `train.gsm8k.path=rows.jsonl` over it.

    Raises FileProblem, UnknownName, and BadSettings with all faults at once.
    """
    path = find_study(name)
    content = {"name": path.stem} | read_yaml(path)
    return make(StudyConfig, with_settings(content, assignments, source="the assignments"), source=str(path))
