"""All that a run needs before its first step: rows as features, models, methods."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from cdm_toolkit.artifacts.maps import load_or_build_neighbours
from cdm_toolkit.distill.dataset import RowCounts, build_dataset, count_rows
from cdm_toolkit.distill.heldout import SomeRows, Spelled, TextKeys, chosen_share
from cdm_toolkit.distill.logs import EvalLog, StepLog
from cdm_toolkit.distill.model_entropies import ModelEntropies
from cdm_toolkit.distill.on_policy import OnPolicy, prompts_of
from cdm_toolkit.distill.sampler import rows_of_epoch
from cdm_toolkit.distill.served_teacher import AnswersOf, connected, served
from cdm_toolkit.distill.sharding import device_to_load_on, is_sharded
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.distill.teacher_settings import PLACEMENT
from cdm_toolkit.distill.trainer import DistillTrainer, Heldout, Mixture, TeacherObjective
from cdm_toolkit.distill.vllm_server import VLLMServer
from cdm_toolkit.errors import (
    BadOption,
    FileProblem,
    MissingExtra,
    ModelNotLoaded,
    NothingToTrain,
    ServerProblem,
)
from cdm_toolkit.forward import keeps_rows_apart
from cdm_toolkit.hub.models import (
    check_placement,
    check_positions,
    check_vocabulary,
    load_model,
    model_fingerprint,
    model_folder,
    stored_quantization,
)
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.integrations.distillkit import DistillKitSet, SetFiles
from cdm_toolkit.kd.batch import Collator, Packing
from cdm_toolkit.kd.method import Method, Teacher
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.settings import DEFAULT_TOP_K
from cdm_toolkit.kd.tokenized_rows import TeacherSide, TokenizerSide, template_notes, tokenizer_side
from cdm_toolkit.teachers.cached import Cached, check_rows, open_cache
from cdm_toolkit.teachers.local import Local
from cdm_toolkit.teachers.served import Connection, Served

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64
    from torch import Tensor
    from transformers import PreTrainedModel, TrainingArguments

    from cdm_toolkit.distill.dataset_store import AlignedDataset
    from cdm_toolkit.distill.settings import DistillConfig, EvalConfig
    from cdm_toolkit.distill.teacher_settings import TeacherConfig


PAPERS_OWN = {"positions", "max_edit_distance", "match_digits", "exact_always"}
"""Settings that only ever belonged to the paper's mapping: who sets one knows which `cdm` is meant."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is: load, entropies, align, neighbours, look, train, evaluate, save.

    `log` is the latest of training, with the `samples` of its last step; `evaluation` what an evaluation has found when
    it is done.
    """

    stage: str
    done: int
    total: int
    log: StepLog | None = None
    evaluation: EvalLog | None = None
    samples: Sequence[Mapping[str, Any]] = ()


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A run before its first step."""

    config: DistillConfig
    rows: Rows
    student: PreTrainedModel
    student_tokenizer: Loaded
    teacher_tokenizers: tuple[Loaded, ...]
    features: AlignedDataset | SomeRows
    counts: RowCounts
    collator: Collator
    objectives: tuple[TeacherObjective, ...]
    mixture: Mixture
    heldout: Heldout | None
    on_policy: OnPolicy | None
    warnings: tuple[str, ...]
    opened: ExitStack
    """Connections to servers."""

    @property
    def served(self) -> set[Served]:
        """Give the teachers behind servers, also those that are asked about other rows alone."""
        asked = {
            teacher for each in self.objectives for teacher in (each.teacher, each.heldout, each.sampled)
        }
        return {teacher for teacher in asked if isinstance(teacher, Served)}

    def flush_answers(self) -> None:
        """Write what servers have answered."""
        for teacher in self.served:
            if teacher.cache is not None:
                teacher.cache.flush()

    def finish_answers(self) -> None:
        """Make teacher caches of the answers of servers, where all that the run trains on is there."""
        numbers: list[int] = []
        for nth, objective in enumerate(self.objectives):
            teacher = objective.teacher
            if isinstance(teacher, Served) and teacher.cache is not None:
                numbers = numbers or [row.number for row in self.rows]
                known = [self.features]
                if self.heldout is not None and objective.heldout is teacher:
                    known.append(self.heldout.features)
                needed = [row.row for rows in known for row in rows if len(row.teachers[nth].groups)]
                teacher.cache.finish(numbers, needed)

    def trainer(
        self,
        arguments: TrainingArguments,
        *,
        on_step: Callable[[int, int, StepLog | None], None] = lambda *_: None,
        on_evaluation: Callable[[int, int, EvalLog | None], None] = lambda *_: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> DistillTrainer:
        for teacher in self.served:
            teacher.stopping = stopping
        if self.on_policy is not None and self.on_policy.server is not None:
            self.on_policy.server.stopping = stopping
        return DistillTrainer(
            self.student,
            arguments,
            self.features,
            self.collator,
            self.student_tokenizer.tokenizer,
            objectives=self.objectives,
            mixture=self.mixture,
            heldout=self.heldout,
            group_by_length=self.config.train.group_by_length,
            batch_tokens=self.config.train.batch_tokens,
            on_policy=self.on_policy,
            on_step=on_step,
            on_evaluation=on_evaluation,
            stopping=stopping,
        )

    def student_again(self, weights: dict[str, Tensor]) -> Any:
        """Load the student once more, whole, on the CPU, with its adapters and these weights."""
        model = load_model(
            self.config.student, device=device_to_load_on("cpu"), dtype=_student_dtype(self.config)
        )
        student = _adapted(model, self.config)
        student.load_state_dict(weights)
        return student


def prepare(
    config: DistillConfig,
    rows: Rows,
    on_progress: OnProgress,
    *,
    keep_answers: bool = True,
    resumed: bool = False,
) -> Prepared:
    """Tokenize, align and load. Without `keep_answers` what servers answer is not written anywhere; a `resumed` run
    has to find the answers of the model that it had.

    Raises the errors of models, tokenizers and servers, NothingToTrain, BadOption, BadRow for a held-out row that is
    trained on.
    """
    with ExitStack() as opened:
        return _prepared(config, rows, on_progress, keep_answers, resumed, opened)


def _prepared(
    config: DistillConfig,
    rows: Rows,
    on_progress: OnProgress,
    keep_answers: bool,
    resumed: bool,
    opened: ExitStack,
) -> Prepared:
    _check_placements(config)
    others = _other_rows(config, rows)
    student_tokenizer = load_tokenizer(config.student)
    tokenizers = tuple(load_tokenizer(teacher.tokenizer_name) for teacher in config.teachers)
    pairs = tuple(_pair(tokenizer, student_tokenizer, config, on_progress) for tokenizer in tokenizers)
    connections: dict[int, Connection] = {}
    for nth, (teacher, pair) in enumerate(zip(config.teachers, pairs, strict=True)):
        _check_method(teacher, pair)
        if teacher.kind == "served":
            connections[nth] = connected(teacher, pair)
            opened.callback(connections[nth].client.close)
    sets = {
        nth: _set(config, pairs[nth]) for nth, each in enumerate(config.teachers) if each.kind == "distillkit"
    }
    models = _Models(config, on_progress)
    student_side = tokenizer_side(student_tokenizer.tokenizer, student_tokenizer.view)
    sides = [
        TeacherSide(pair.teacher, teacher.aligner)
        for pair, teacher in zip(pairs, config.teachers, strict=True)
    ]

    def built(rows: Rows) -> tuple[AlignedDataset, RowCounts]:
        return build_dataset(
            rows,
            student_side,
            sides,
            max_length=config.data.max_length,
            template=config.data.template,
            workers=config.data.workers,
            entropies=models.entropies(len(rows)),
            on_row=lambda done: on_progress(Progress("align", done, len(rows))),
        )

    every, counts = built(rows)
    if not len(every):
        raise NothingToTrain(config.data.name, str(counts))
    features: AlignedDataset | SomeRows = every
    heldout, read, notes = None, [every], []
    if others is not None:
        found, of_others = built(others)
        if not len(found):
            fix = "raise `max_length`, or check the fields of its rows"
            raise FileProblem(others.sources[0].path, f"none of its rows can be evaluated: {of_others}", fix)
        heldout = _heldout(config, others, found, student_side)
        read, notes = [every, found], [f"held-out rows: {note}" for note in _of_rows(of_others)]
    elif config.eval is not None:
        chosen = _share(config.eval, rows, every)
        features, counts = SomeRows(every, np.flatnonzero(~chosen)), count_rows(every, ~chosen)
        heldout = _heldout(config, rows, SomeRows(every, np.flatnonzero(chosen)), student_side)
    student = models.student
    _check(student, config.student, student_tokenizer, [each.student_lengths for each in read])
    on_policy = _on_policy(config, rows, features, student_side, sides, models)
    if on_policy is not None and on_policy.server is not None:
        opened.callback(on_policy.server.close)
        if keep_answers and os.environ.get("RANK", "0") == "0":  # not where the run is only planned
            opened.enter_context(on_policy.server.lock())
    data = _Data(rows, others, read, models, connections, sets, keep_answers, resumed)
    objectives = tuple(
        _objective(nth, pair, tokenizer, data)
        for nth, (pair, tokenizer) in enumerate(zip(pairs, tokenizers, strict=True))
    )
    made = Prepared(
        config=config,
        rows=rows,
        student=_adapted(student, config),
        student_tokenizer=student_tokenizer,
        teacher_tokenizers=tokenizers,
        features=features,
        counts=counts,
        collator=Collator(
            tuple(pair.fingerprints for pair in pairs),
            tuple((pair.name_t, pair.name_s) for pair in pairs),
            packing=models.packing(),
        ),
        objectives=objectives,
        mixture=_mixture(config, rows, features),
        heldout=heldout,
        on_policy=on_policy,
        warnings=(
            *_warnings(config, counts, pairs),
            *notes,
            *(_of_samples(config, features, on_policy) if on_policy else ()),
            *template_notes(student_side, sides, config.data.template),
            *(note for connection in connections.values() for note in connection.notes),
            *_of_candidates(objectives),
        ),
        opened=ExitStack(),
    )
    opened.callback(made.flush_answers)
    return replace(made, opened=opened.pop_all())


def _on_policy(
    config: DistillConfig,
    rows: Rows,
    features: AlignedDataset | SomeRows,
    student: TokenizerSide,
    teachers: Sequence[TeacherSide],
    models: _Models,
) -> OnPolicy | None:
    """Tokenize the prompts, and see that all models can read a row up to its limit. BadOption, BadArtifact."""
    settings, data = config.on_policy, config.data
    if settings is None:
        return None
    if is_sharded():
        allowed = (
            "no on_policy where the student is in shards, or TRL's GOLDTrainer with the loss of a method"
        )
        raise BadOption("on_policy", "set", allowed)
    prompts = prompts_of(rows, features.numbers, student, data.template, data.max_length - 1)
    if not prompts:
        allowed = f"none: no row of {data.name} has a prompt that leaves room for a sample"
        raise BadOption("on_policy", "set", allowed)
    longest = max(len(prompt.ids) for prompt in prompts.values()) + settings.max_new_tokens
    longest = min(longest, data.max_length)
    check_positions(models.student, config.student, longest, option="max_length")
    for teacher in config.teachers:
        if teacher.method_class.samples_alone and len(prompts) < len(features):
            missing = f"{len(features) - len(prompts)} of {len(features)} rows have no prompt with room for a sample"
            allowed = f"another method: {missing}, and {teacher.method} learns from samples alone"
            raise BadOption(f"the method of {teacher.model}", teacher.method, allowed)
    for nth, teacher in enumerate(config.teachers):
        if teacher.kind == "local":  # nobody knows how many tokens a sample is for a teacher
            check_positions(models.teacher(nth), teacher.model, data.max_length, option="max_length")
    return OnPolicy(
        settings,
        prompts,
        student,
        tuple(teachers),
        data.template,
        data.max_length,
        config.train.seed,
        _vllm_server(config, longest),
    )


def _vllm_server(config: DistillConfig, longest: int) -> VLLMServer | None:
    """Connect to the server that samples, if one does. BadOption, ServerProblem."""
    settings = config.on_policy
    if settings is None or settings.engine != "vllm":
        return None
    if config.train.lora is not None:
        allowed = "transformers where adapters are trained: the server reads whole weights"
        raise BadOption("on_policy.engine", "vllm", allowed)
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if local < world and urlsplit(settings.url).hostname in ("localhost", "127.0.0.1", "::1"):
        allowed = "one server that all machines of the run reach: the first process alone gives it weights"
        raise BadOption("on_policy.url", settings.url, allowed)
    server = VLLMServer(settings, config.student, Path(config.output))
    try:
        server.connect(longest)
    except ServerProblem:
        server.close()
        raise
    return server


def _of_samples(
    config: DistillConfig, features: AlignedDataset | SomeRows, on_policy: OnPolicy
) -> Iterator[str]:
    settings = on_policy.settings
    for teacher in config.teachers:
        if teacher.method_class.samples_alone and (settings.temperature, settings.top_p) != (1, 1):
            yield (
                f"method {teacher.method} has the gradient of reverse KL at temperature 1 and top_p 1 alone: "
                f"they are {settings.temperature:g} and {settings.top_p:g}"
            )
    if without := len(features) - len(on_policy.prompts):
        yield f"{without} of {len(features)} rows have no prompt with room for a sample: they are never sampled"


def _other_rows(config: DistillConfig, rows: Rows) -> Rows | None:
    """Give the rows to evaluate on where they are not of the data. BadRow for one that is trained on."""
    if config.eval is None or config.eval.share is not None:
        return None
    others = Rows(config.eval.all_sources, config.train.seed)
    TextKeys.of(others).refuse_in(TextKeys.of(rows), (config.eval.name, config.data.name))
    return others


def _share(settings: EvalConfig, rows: Rows, features: AlignedDataset) -> Bool[np.ndarray, " row"]:
    """Choose the rows of the data that are held out. BadOption where those are none, or all."""
    assert settings.share is not None
    chosen = chosen_share(TextKeys.of(rows).at(features.numbers), settings.share, settings.limit)
    if not chosen.any():
        raise BadOption("eval.share", settings.share, f"more: it has none of {len(features)} rows")
    if chosen.all():
        raise BadOption("eval.share", settings.share, "less: no row is left to train on")
    return chosen


def _heldout(
    config: DistillConfig, rows: Rows, features: AlignedDataset | SomeRows, side: TokenizerSide
) -> Heldout:
    """Put together what an evaluation needs of held-out rows, which are the `features` of some of `rows`."""
    assert config.eval is not None
    digest, groups = hashlib.sha256(), np.zeros(len(config.teachers), np.int64)
    for row in features:
        digest.update(row.student_ids.tobytes())
        groups += np.array([len(teacher.groups) for teacher in row.teachers], np.int64)
    return Heldout(
        features=features,
        mixture=_alphas(config, rows),
        spelled=Spelled.of(side, rows, features, config.data.template),
        counts=(int(features.label_counts.sum()), *groups.tolist()),
        fingerprint=digest.hexdigest(),
        settings=config.eval,
    )


def _alphas(config: DistillConfig, rows: Rows) -> Mixture:
    """Tell the alphas of rows by their sources; each row comes once."""
    alphas = [config.alpha if source.alpha is None else source.alpha for source in rows.sources]
    if len(set(alphas)) == 1 or not config.teachers:
        return Mixture.of_one(alphas[0] if config.teachers else 1.0)
    of_source = np.array(alphas)
    return Mixture(
        tuple(sorted(set(alphas))),
        lambda numbers: of_source[rows.source_of(np.array(numbers))].tolist(),
    )


def _mixture(config: DistillConfig, rows: Rows, features: AlignedDataset | SomeRows) -> Mixture:
    """Tell the weights and alphas of the rows' sources by the rows. BadOption where no row is left for an epoch."""
    weights = np.array([source.weight for source in rows.sources])[rows.source_of(features.numbers)]
    if (weights == 1).all():
        return _alphas(config, rows)
    if not len(rows_of_epoch(weights, np.random.default_rng(0))):
        raise BadOption("weight", weights.max(), "more: an epoch has no row")
    return replace(_alphas(config, rows), weights=weights)


def _pair(teacher: Loaded, student: Loaded, config: DistillConfig, on_progress: OnProgress) -> TokenizerPair:
    """Make a pair whose tables of near tokens are kept in the cache folder."""
    pair = TokenizerPair.from_loaded(teacher, student)
    pair.neighbour_builder = load_or_build_neighbours
    pair.workers = config.data.workers
    pair.progress = lambda done, total: on_progress(Progress("neighbours", done, total))
    return pair


@dataclass(frozen=True, slots=True, eq=False)
class _Data:
    """What teachers are asked about, and the models and connections that are there to ask.

    `others` are rows that are held out, where they are not of the data; `read` are the features of the rows, and those
    of the others.
    """

    rows: Rows
    others: Rows | None
    read: Sequence[AlignedDataset]
    models: _Models
    connections: Mapping[int, Connection]
    sets: Mapping[int, DistillKitSet]
    keep_answers: bool
    resumed: bool


def _objective(nth: int, pair: TokenizerPair, tokenizer: Loaded, data: _Data) -> TeacherObjective:
    """Open the `nth` teacher's cache, or load its model, and build its method for the pair.

    Raises what caches, models and tables raise.
    """
    run = data.models.config
    config, device = run.teachers[nth], run.train.torch_device
    options, kind = config.method_options, config.method_class
    teacher: Teacher
    heldout: Teacher | None
    sampled: Teacher | None = None
    if config.kind == "cached":
        assert config.cache is not None
        cache = open_cache(config.cache, pair.teacher, data.rows, run.data.template)
        check_rows(cache, data.read[0], nth)
        _at_most(options, kind, pair, cache.k)
        teacher = Cached(cache)
        heldout = teacher if data.others is None else None  # a cache has no others
    elif config.kind == "distillkit":
        _at_most(options, kind, pair, data.sets[nth].k)
        teacher = Cached(data.sets[nth])
        heldout = teacher if data.others is None else None
    elif config.kind == "served":
        connection = data.connections[nth]
        longest = max(int(features.teacher_lengths[nth].max()) for features in data.read)
        # nobody knows how many tokens a sample is for a teacher
        connection.check_length(run.data.max_length if run.on_policy is not None else longest)
        _at_most(options, kind, pair, connection.k)
        teacher = served(config, connection, pair.teacher, run.data, _answers(nth, data))
        heldout = teacher
        if run.on_policy is not None:
            sampled = served(config, connection, pair.teacher, run.data, None)
        if data.others is not None:
            heldout = served(config, connection, pair.teacher, run.data, _answers(nth, data, data.others))
    else:
        teacher = heldout = sampled = Local(
            _teacher(data.models, nth, tokenizer, data.read), vocab=pair.vocab_t
        )
    method: Method[Any, Any] = kind(pair, **options).to(device)
    if not isinstance(teacher, Local):
        teacher.check(method.signal_request)
    if kind.samples_alone:
        heldout = None
    return TeacherObjective(config.model, teacher, method, config.weight, heldout, sampled)


def _set(run: DistillConfig, pair: TokenizerPair) -> DistillKitSet:
    """Open the set that the rows are, and look at its first row: what does not fit is told before all are read."""
    (source,) = run.sources
    (teacher,) = (each for each in run.teachers if each.kind == "distillkit")
    files = SetFiles(source.path, source.split, source.config, teacher.compression)
    found = DistillKitSet(files, pair.teacher.view)
    found.row(1)
    return found


def _of_candidates(objectives: Sequence[TeacherObjective]) -> Iterator[str]:
    """Say how often a method meets tokens whose log-probability a set does not have."""
    for each in objectives:
        stored = each.teacher.cache if isinstance(each.teacher, Cached) else None
        if isinstance(stored, DistillKitSet) and each.method.signal_request.token_logprobs:
            share, rows = stored.unknown_share()
            yield (
                f"{share:.1%} of the tokens in the first {rows} rows of {stored.folder} are none of its {stored.k} "
                "candidates: their log-probability is taken to be the most that these leave"
            )


def _at_most(options: dict[str, Any], kind: type[Method[Any, Any]], pair: TokenizerPair, k: int) -> None:
    """Take as many candidates as a teacher has, where the method asks for no number of them."""
    if kind.reads_top_k() and options.get("top_k") is None:
        options["top_k"] = min(DEFAULT_TOP_K, k, pair.vocab_t, pair.vocab_s)


def _answers(nth: int, data: _Data, others: Rows | None = None) -> AnswersOf | None:
    """Say where the answers of the `nth` teacher are kept: about the data's rows, or about others that are held out."""
    if not data.keep_answers:
        return None
    run = data.models.config
    may_replace = run.teachers[nth].cache is None and not data.resumed
    folder = Path(run.teachers[nth].cache or Path(run.output) / f"answers-of-teacher-{nth}")
    if others is None:
        return AnswersOf(folder, data.rows, run.data.name, may_replace)
    assert run.eval is not None
    return AnswersOf(folder / "held-out", others, run.eval.name, may_replace)


class _Models:
    """Load each model once, when it is first needed."""

    def __init__(self, config: DistillConfig, on_progress: OnProgress) -> None:
        self.config, self.on_progress = config, on_progress
        self._student: PreTrainedModel | None = None
        self._teachers: dict[int, PreTrainedModel] = {}
        self._many = 1 + sum(teacher.kind == "local" for teacher in config.teachers)

    @property
    def student(self) -> PreTrainedModel:
        if self._student is None:
            train = self.config.train
            self._student = load_model(
                self.config.student,
                device=device_to_load_on(train.torch_device),
                dtype=_student_dtype(self.config),
                attn_implementation=train.attn_implementation,
            )
            self._tell()
        return self._student

    def teacher(self, nth: int) -> PreTrainedModel:
        if nth not in self._teachers:
            teacher, train = self.config.teachers[nth], self.config.train
            if is_sharded() and (kind := stored_quantization(model_folder(teacher.model))):
                why = f"it is quantised ({kind}), and the run keeps models in shards"
                raise ModelNotLoaded(teacher.model, why, "take weights that are not quantised, or a cache")
            self._teachers[nth] = load_model(
                teacher.model,
                device=device_to_load_on(teacher.device or train.torch_device),
                dtype=teacher.dtype,
                attn_implementation=train.attn_implementation,
                device_map=teacher.device_map,
                quantization=teacher.quantization,
            )
            self._tell()
        return self._teachers[nth]

    def packing(self) -> Packing | None:
        """Say how rows are packed, once each model has shown that it keeps them apart. BadOption where one does not."""
        if not self.config.train.pack:
            return None
        attention = str(self.student.config._attn_implementation)
        packing: Packing = "one" if "flash" in attention else "rows"  # one asks for attention of any length
        models = [(self.config.student, self.student)]
        models += [
            (each.model, self.teacher(nth))
            for nth, each in enumerate(self.config.teachers)
            if each.kind == "local"
        ]
        for name, model in models:
            if not keeps_rows_apart(model):
                allowed = (
                    f"false: {name} does not keep rows apart that lie end to end (attention {attention})"
                )
                raise BadOption("train.pack", True, allowed)
        return packing

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


def _student_dtype(config: DistillConfig) -> str | None:
    """Name the dtype of the student's weights; None for what is usual, where the run does not say it."""
    return config.train.weights if "weights" in config.train.model_fields_set else None


def _check_placements(config: DistillConfig) -> None:
    """See before anything is loaded that each teacher can be where it is asked to be. Raises as `check_placement`."""
    for nth, teacher in enumerate(config.teachers):
        asked = {name: getattr(teacher, name) for name in PLACEMENT}
        check_placement(**asked, where=f"teachers.{nth}.")
        for name, value in asked.items():
            if is_sharded() and value is not None:
                allowed = "nothing there: teachers in memory are in shards, as the student is"
                raise BadOption(f"teachers.{nth}.{name}", value, allowed)


def _check_method(teacher: TeacherConfig, pair: TokenizerPair) -> None:
    """See before any model is loaded that the method can be built for the pair."""
    method = teacher.method_class
    if method.same_tokenizer and not pair.same_tokenizer:
        allowed = f"one for different tokenizers, such as spelling: {pair.name_t} is not {pair.name_s}"
        raise BadOption(f"the method of {teacher.model}", teacher.method, allowed)
    method.check_top_k(pair, teacher.method_options.get("top_k"))


def _check(
    model: PreTrainedModel, name: str, tokenizer: Loaded, lengths: Sequence[Int64[np.ndarray, " row"]]
) -> None:
    """See that a model has a row for each id, and a position for each token."""
    check_vocabulary(model, name, tokenizer.view.vocab_size)
    check_positions(model, name, int(np.concatenate(lengths).max()), option="max_length")


def _teacher(models: _Models, nth: int, tokenizer: Loaded, read: Sequence[AlignedDataset]) -> PreTrainedModel:
    """Load a teacher that can read its side of the rows."""
    model = models.teacher(nth)
    lengths = [features.teacher_lengths[nth] for features in read]
    _check(model, models.config.teachers[nth].model, tokenizer, lengths)
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


def _warnings(config: DistillConfig, counts: RowCounts, pairs: tuple[TokenizerPair, ...]) -> Iterator[str]:
    for teacher, pair in zip(config.teachers, pairs, strict=True):
        if pair.same_tokenizer and not teacher.method_class.same_tokenizer:
            yield f"{teacher.model} and the student have the same tokenizer: kl would do, without a mapping"
        if teacher.method == "cdm" and not PAPERS_OWN & teacher.method_options.keys():
            yield (
                "method cdm is the paper's (arXiv 2502.11104); the toolkit's mapping by spelling, which earlier "
                "versions called cdm, is method spelling"
            )
    yield from _of_rows(counts)


def _of_rows(counts: RowCounts) -> Iterator[str]:
    if counts.unaligned:
        yield f"{counts.unaligned} of {counts.trained} rows could not be aligned; they train by CE alone"
    if counts.cut:
        yield f"{counts.cut} of {counts.trained} rows were cut to the maximum length"
    if counts.empty or counts.too_long:
        yield f"of {counts.read} rows {counts.empty} empty and {counts.too_long} too long ones were left out"
