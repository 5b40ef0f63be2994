"""Run a teacher over all rows once, or ask a server, and store its log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator

from cdm_toolkit.artifacts.code_fingerprint import code_fingerprint
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.artifacts.settings import Count, Text
from cdm_toolkit.artifacts.teacher_cache import (
    CachedRow,
    CacheWriter,
    folder_size,
    missing_shards,
    read_header,
    read_note,
    shard_name,
)
from cdm_toolkit.artifacts.teacher_header import FORMAT, ROWS_PER_SHARD, CacheHeader
from cdm_toolkit.distill.served_teacher import SERVED, other_probe, served_fingerprint, server_settings
from cdm_toolkit.distill.settings import SourceConfig, from_file
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.distill.teacher_settings import (
    OF_A_SERVER,
    PLACEMENT,
    DeviceMap,
    Quantization,
    TeacherSource,
    WeightsDtype,
    listed_together,
    placement_faults,
)
from cdm_toolkit.errors import BadArtifact, BadOption, BadRow, NothingToTrain
from cdm_toolkit.forward import ForwardBatch, logits_by_batch
from cdm_toolkit.hub.models import (
    check_placement,
    check_positions,
    check_vocabulary,
    load_model,
    model_fingerprint,
    model_folder,
    resolve_device,
    weights_kind,
)
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.rows import Learn, Row, rows_fingerprint
from cdm_toolkit.kd.settings import Fault
from cdm_toolkit.kd.sparse_logprobs import log_sum_exp, top_k, values_at
from cdm_toolkit.kd.tokenized_rows import (
    TemplateName,
    TokenizerSide,
    has_completion,
    template_fingerprint,
    tokenize_rows,
    tokenizer_side,
)
from cdm_toolkit.teachers.served import Connection, connect

if TYPE_CHECKING:
    from jaxtyping import Float, Int32
    from torch import Tensor
    from transformers import PreTrainedModel


WHOLE_ROWS_PER_SHARD = 8
"""A shard of 8 answers of 150 tokens has 240 MB with all of 49,152 ids."""


class CacheSettings(TeacherSource):
    """What to cache, and how."""

    data: Text
    """The rows of the run: a file, a pattern, a data set on the hub, or the run file itself (`.yaml`), whose sources,
    template and max_length are taken."""
    output: Text
    """Folder to write, or to go on with."""
    k: Annotated[int, Field(ge=0)] = 100
    """Most likely ids that are kept at each token; 0 keeps the whole vocabulary."""
    dtype: Literal["float16", "float32"] | None = None
    """Of log-probabilities on disk; float16, or float32 for the whole vocabulary."""
    quantised: bool = False
    """Keep log-probabilities in a few bits each."""
    max_length: Annotated[int, Field(ge=4)] = 512
    """Tokens of a row; more are cut."""
    template: TemplateName = "none"
    """chat: rows are read through the model's chat template."""
    learn: Learn = "all"
    """Which answers of a chat the run learns: all, or the last."""
    batch_size: Count = 8
    """Rows that the model reads at once."""
    device: Text = "auto"
    """auto: a GPU where there is one, else the CPU."""
    device_map: DeviceMap | None = None
    """The model's layers over several devices, by accelerate: auto, balanced, balanced_low_0, sequential, or devices by
    the names of modules, such as `{model: cuda:0, lm_head: cuda:1}`."""
    teacher_dtype: WeightsDtype | None = None
    """Of the model's weights: float32 unless it is set; auto: as they are stored. What is quantised keeps its own."""
    quantization: Quantization | None = None
    """Quantise the model's weights to 4bit or 8bit by bitsandbytes as they are read."""
    shard: str = "1/1"
    """Which of n parts of the work to do, as i/n: for several machines."""
    limit: Count | None = None
    """Rows at the front of the file to take; all where it is not set."""
    rows_per_shard: Count | None = None
    """Rows of a file; an interrupted run goes on after the last. 256, or 8 with the whole vocabulary."""

    @field_validator("shard")
    @classmethod
    def _is_a_part(cls, shard: str) -> str:
        part, slash, parts = shard.partition("/")
        if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
            raise ValueError(f"{shard!r} is no part: give i/n with i from 1 to n, such as 1/4")
        return shard

    @model_validator(mode="wrap")
    @classmethod
    def _can_be_loaded(cls, given: Any, handler: ModelWrapValidatorHandler[CacheSettings]) -> CacheSettings:
        """Check how the model is loaded, also where a field has a fault: all are listed at once."""
        if not isinstance(given, Mapping):
            return handler(given)
        faults = [*placement_faults(given, dtype="teacher_dtype"), *_server_faults(given)]
        return listed_together(faults, handler, given)

    @model_validator(mode="after")
    def _fits_together(self) -> CacheSettings:
        if self.quantised and self.dtype == "float32":
            raise ValueError("quantised keeps no float32: leave dtype or quantised out")
        if self.k == 0 and (self.quantised or self.dtype == "float16"):
            raise ValueError("k 0 keeps the whole vocabulary in float32: leave quantised and dtype out")
        return self

    @property
    def torch_device(self) -> str:
        """Name the device that `device` stands for on this machine. BadOption for one that is not here."""
        return str(resolve_device(self.device))

    @property
    def runs_on(self) -> str:
        """Name the device that the model runs on, or how its layers are put on several; or its servers."""
        if self.url:
            return ", ".join(self.url)
        return self.torch_device if self.device_map is None else f"several, by device_map {self.device_map}"

    @property
    def part(self) -> tuple[int, int]:
        part, _, parts = self.shard.partition("/")
        return int(part), int(parts)


def _server_faults(given: Mapping[str, Any]) -> Iterator[Fault]:
    """Find settings of a model here where a server has it, and of a server where there is none."""
    useless = (*PLACEMENT, "teacher_dtype", "batch_size") if given.get("url") else OF_A_SERVER[1:]
    for name in useless:
        if given.get(name) is not None:
            beside = "where a server has the model" if given.get("url") else "without a url"
            yield Fault(name, f"is of no use {beside}")
    if given.get("url") and given.get("k") == 0:
        yield Fault("k", "0 keeps the whole vocabulary, which no server gives: give a number of candidates")


@dataclass(frozen=True, slots=True)
class CacheProgress:
    """How far the work is: rows of this part, the kept ones among them; `tokens` a second of those made now."""

    rows: int
    total: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What `write_cache` has done. `tokens` and `size` (bytes) are of this part, what was there among it."""

    folder: Path
    header: CacheHeader
    rows: int
    tokens: int
    size: int
    made: tuple[str, ...]
    kept: tuple[str, ...]
    damaged: tuple[str, ...]
    """Shards that were there, were not whole and were made again; `made` has them too."""
    missing: int
    """Shards of the whole cache that are left for other parts."""
    seconds: float
    tokens_per_second: float
    notes: tuple[str, ...] = ()
    """What is to be told of servers."""


OnProgress = Callable[[CacheProgress], None]


def write_cache(settings: CacheSettings, *, on_progress: OnProgress = lambda _: None) -> CacheResult:
    """Run a teacher over all rows, or a part of them, and write its log-probabilities at each token of the completions.

    What the folder has already is checked and kept; a damaged shard is made again. Raises the errors of data, model
    and tokenizer, BadOption for a `k` or `max_length` that is too large, NothingToTrain, and those of CacheWriter.
    """
    began = time.perf_counter()
    if not settings.url:
        check_placement(
            settings.torch_device, settings.device_map, settings.quantization
        )  # told before all else
    settings, sources = _sources(settings)
    rows = list(islice(Rows(sources), settings.limit))
    if not any(has_completion(row, settings.template) for row in rows):
        raise NothingToTrain(settings.data, f"{len(rows)} rows, all with an empty completion")
    loaded = load_tokenizer(settings.tokenizer_name)
    side = tokenizer_side(loaded.tokenizer, loaded.view)
    part, parts = settings.part
    with ExitStack() as opened:
        connection = None
        if settings.url:
            is_default = "k" not in settings.model_fields_set
            connection = connect(
                server_settings(settings), side, k=settings.k, at_most=is_default, option="k"
            )
            opened.callback(connection.client.close)
            settings = settings.model_copy(update={"k": connection.k})
        header = _header(settings, side, rows, connection)
        writer = CacheWriter(Path(settings.output), header)
        if connection is not None and (other := other_probe(read_header(writer.folder), connection)):
            raise BadArtifact(
                writer.folder, other[0], "give another `output`, or serve the model that they are of"
            )
        work = _Work(settings, side, header, rows, writer, on_progress, connection)
        work.do(range(part - 1, header.shards, parts))
        notes = connection.notes if connection else ()
        return replace(work.result(time.perf_counter() - began), notes=notes)


def _sources(settings: CacheSettings) -> tuple[CacheSettings, tuple[SourceConfig, ...]]:
    """Find the sources, in a run file where one is given; what it says of rows holds unless the settings say it."""
    if Path(settings.data).suffix not in (".yaml", ".yml"):
        return settings, (SourceConfig(path=settings.data, limit=settings.limit, learn=settings.learn),)
    run = from_file(Path(settings.data))
    data = run.data
    said = {"template": data.template, "max_length": data.max_length}
    own = {name: value for name, value in said.items() if name not in settings.model_fields_set}
    return settings.model_copy(update=own), run.sources


def _header(
    settings: CacheSettings, side: TokenizerSide, rows: Sequence[Row], connection: Connection | None
) -> CacheHeader:
    vocab = side.view.vocab_size
    if settings.k > vocab:
        raise BadOption(
            "k", settings.k, f"at most {vocab}: {settings.model} has no more ids; 0 keeps them all"
        )
    whole = settings.k in (0, vocab)
    if whole and (settings.quantised or settings.dtype == "float16"):
        raise BadOption("k", settings.k, f"less than {vocab}: the whole vocabulary is kept in float32")
    if connection is None:
        model = model_fingerprint(model_folder(settings.model))
        weights = weights_kind(settings.model, settings.teacher_dtype, settings.quantization)
    else:
        model, weights = served_fingerprint(settings.model), SERVED
    data = rows_fingerprint(rows)
    named = {"model": model, "tokenizer": side.view.fingerprint, "data": data}
    return CacheHeader(
        code=code_fingerprint(*FORMAT.code),
        model=settings.model,
        model_fingerprint=model,
        teacher_dtype=weights,
        tokenizer=side.view.name,
        tokenizer_fingerprint=side.view.fingerprint,
        vocab=vocab,
        data=settings.data,
        data_fingerprint=data,
        rows=len(rows),
        limit=settings.limit,
        template=settings.template,
        template_fingerprint=template_fingerprint(side, settings.template),
        k=settings.k or vocab,
        dtype="float32" if whole else settings.dtype or "float16",
        quantised=settings.quantised,
        max_length=settings.max_length,
        rows_per_shard=settings.rows_per_shard or (WHOLE_ROWS_PER_SHARD if whole else ROWS_PER_SHARD),
        probe=connection.probe if connection is not None else None,
        provenance=dict(provenance(fingerprints=named, device=settings.runs_on)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _TeacherRow:
    """A row in the teacher's tokens; position `first` predicts the first token of the completion."""

    number: int
    ids: Int32[np.ndarray, " time_t"]
    first: int

    @property
    def positions(self) -> range:
        return range(self.first, len(self.ids) - 1)


class _Work:
    """The part of a cache that this process makes."""

    def __init__(
        self,
        settings: CacheSettings,
        side: TokenizerSide,
        header: CacheHeader,
        rows: Sequence[Row],
        writer: CacheWriter,
        on_progress: OnProgress,
        connection: Connection | None,
    ) -> None:
        self.connection = connection
        self.settings, self.side, self.header, self.rows = settings, side, header, rows
        self.writer, self.on_progress = writer, on_progress
        self.states: dict[int, str] = {}
        self.rows_done = self.tokens_made = 0
        self.seconds = 0.0

    def do(self, shards: Sequence[int]) -> None:
        """Make the shards that are not whole; the model is loaded if there are any."""
        self.states = {index: self.writer.state(index) for index in shards}
        self.rows_done = sum(len(self._rows(index)) for index in shards if self.states[index] == "whole")
        self._tell()
        todo = [index for index in shards if self.states[index] != "whole"]
        if not todo:
            return
        settings = self.settings
        if self.connection is not None:
            for index in todo:
                self.writer.write(index, self._served_shard(self.connection, index))
            return
        model = load_model(
            settings.model,
            device=settings.torch_device,
            dtype=settings.teacher_dtype,
            device_map=settings.device_map,
            quantization=settings.quantization,
        )
        check_vocabulary(model, settings.model, self.header.vocab)
        for index in todo:
            self.writer.write(index, self._shard(model, index), device=settings.runs_on)

    def result(self, seconds: float) -> CacheResult:
        folder = self.writer.folder
        names = {index: shard_name(index) for index in self.states}
        return CacheResult(
            folder=folder,
            header=self.header,
            rows=sum(len(self._rows(index)) for index in self.states),
            tokens=sum(read_note(folder, self.header, index).positions for index in self.states),
            size=folder_size(folder, self.states),
            made=tuple(names[index] for index, state in self.states.items() if state != "whole"),
            kept=tuple(names[index] for index, state in self.states.items() if state == "whole"),
            damaged=tuple(names[index] for index, state in self.states.items() if state == "damaged"),
            missing=len(missing_shards(folder, self.header)),
            seconds=seconds,
            tokens_per_second=self.tokens_made / self.seconds if self.seconds else 0.0,
        )

    def _rows(self, index: int) -> Sequence[Row]:
        size = self.header.rows_per_shard
        return self.rows[index * size : (index + 1) * size]

    def _tell(self) -> None:
        total = sum(len(self._rows(index)) for index in self.states)
        self.on_progress(CacheProgress(self.rows_done, total, self.tokens_made, self.seconds))

    def _shard(self, model: PreTrainedModel, index: int) -> list[CachedRow]:
        """Run the model over a shard's rows, those of like length together."""
        tokenized = _tokenize(self.side, self._rows(index), self.settings.template, self.header.max_length)
        longest = max(len(row.ids) for row in tokenized)
        check_positions(model, self.settings.model, longest, option="max_length")
        ids, positions = [row.ids for row in tokenized], [row.positions for row in tokenized]
        cached = [self._without_positions(row) for row in tokenized if not row.positions]
        self.rows_done += len(cached)
        began = time.perf_counter()
        for batch in logits_by_batch(model, ids, positions, size=self.settings.batch_size):
            cached += self._reduced([tokenized[nth] for nth in batch.rows], batch)
            self.seconds += time.perf_counter() - began
            self.tokens_made += len(batch.values)
            self.rows_done += len(batch.rows)
            self._tell()
            began = time.perf_counter()
        return sorted(cached, key=lambda row: row.number)

    def _served_shard(self, connection: Connection, index: int) -> list[CachedRow]:
        """Ask for all rows of a shard."""
        client = connection.client
        tokenized = _tokenize(self.side, self._rows(index), self.settings.template, self.header.max_length)
        connection.check_length(max(len(row.ids) for row in tokenized))
        began = time.perf_counter()
        asked = [
            client.submit(row.ids.tolist(), row.first, self.header.k) if row.positions else None
            for row in tokenized
        ]
        cached = []
        for row, future in zip(tokenized, asked, strict=True):
            if future is None:
                cached.append(self._without_positions(row))
            else:
                scored = future.result()
                arrays = scored.ids, scored.logprobs, scored.token_logprobs
                cached.append(CachedRow(row.number, row.ids, row.first, *arrays))
            self.seconds += time.perf_counter() - began
            self.tokens_made += len(row.positions)
            self.rows_done += 1
            self._tell()
            began = time.perf_counter()
        return cached

    def _without_positions(self, row: _TeacherRow) -> CachedRow:
        none = np.empty((0, self.header.k), np.float32)
        return CachedRow(row.number, row.ids, row.first, none.astype(np.int32), none, none.sum(1))

    def _reduced(self, rows: Sequence[_TeacherRow], batch: ForwardBatch) -> Iterator[CachedRow]:
        next_ids = np.concatenate([row.ids[row.first + 1 :] for row in rows])
        arrays = sparse_teacher_logprobs(batch.values, next_ids, vocab=self.header.vocab, k=self.header.k)
        ends = np.cumsum(batch.counts)[:-1]
        parts = zip(rows, *(np.split(array, ends) for array in arrays), strict=True)
        for row, ids, logprobs, tokens in parts:
            if not (np.isfinite(tokens).all() and not np.isnan(logprobs).any()):
                fix = "give `teacher_dtype='float32'`, or check the model"
                raise BadRow(self.settings.data, row.number, "the teacher's logits are not finite", fix)
            yield CachedRow(row.number, row.ids, row.first, ids, logprobs, tokens)


def _tokenize(
    side: TokenizerSide, rows: Sequence[Row], template: TemplateName, max_length: int
) -> list[_TeacherRow]:
    """Tokenize rows as training does, and cut them; one without a completion has no ids."""
    full = [row for row in rows if has_completion(row, template)]
    tokenized = dict(
        zip((row.number for row in full), tokenize_rows(side, full, template) if full else (), strict=True)
    )
    nothing = np.empty(0, np.int32)
    return [
        _TeacherRow(row.number, found.ids[:max_length].astype(np.int32), found.label_from - 1)
        if (found := tokenized.get(row.number))
        else _TeacherRow(row.number, nothing, 0)
        for row in rows
    ]


def sparse_teacher_logprobs(
    logits: Float[Tensor, "position columns"], next_ids: Int32[np.ndarray, " position"], *, vocab: int, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reduce a teacher's logits: ids [position, k] and log-probabilities of the likeliest of the first `vocab` ids.

    Best first; where `k` is `vocab` the ids are in their own order. Gives also the log-probability of the token that
    follows each position.
    """
    real = logits.narrow(1, 0, vocab)
    lse = log_sum_exp(real)
    following = torch.from_numpy(next_ids).long().to(logits.device)
    tokens = values_at(logits, torch.arange(len(logits), device=logits.device), following).float() - lse
    if k == vocab:
        logprobs = (real.float() - lse[:, None]).cpu().numpy()
        ids_of_all = np.broadcast_to(np.arange(vocab, dtype=np.int32), logprobs.shape)
        return ids_of_all, logprobs, tokens.cpu().numpy()
    top = top_k(logits, k, real=vocab, lse=lse)
    return top.ids.cpu().numpy().astype(np.int32), top.logprobs.cpu().numpy(), tokens.cpu().numpy()
