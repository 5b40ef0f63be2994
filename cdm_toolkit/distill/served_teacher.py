"""A run's teacher behind a server: connected before a model is loaded, its answers kept in a cache."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_toolkit.artifacts.code_fingerprint import code_fingerprint
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.artifacts.read_through_cache import ReadThroughCache
from cdm_toolkit.artifacts.teacher_cache import read_header
from cdm_toolkit.artifacts.teacher_header import FORMAT, HEADER_FILE, ROWS_PER_SHARD, CacheHeader
from cdm_toolkit.errors import BadArtifact
from cdm_toolkit.kd.settings import DEFAULT_TOP_K
from cdm_toolkit.kd.tokenized_rows import template_fingerprint
from cdm_toolkit.teachers.scoring_client import ServerSettings, other_model
from cdm_toolkit.teachers.served import Connection, Served, connect

if TYPE_CHECKING:
    from cdm_toolkit.distill.settings import DataConfig
    from cdm_toolkit.distill.sources import Rows
    from cdm_toolkit.distill.teacher_settings import TeacherConfig, TeacherSource
    from cdm_toolkit.kd.pair import TokenizerPair
    from cdm_toolkit.kd.tokenized_rows import TokenizerSide

SERVED = "served"
"""What a cache has for the dtype of weights that nobody knows."""


def served_fingerprint(model: str) -> str:
    """Give what stands for the fingerprint of a model of whose weights nothing is known: its probe tells it apart."""
    return hashlib.sha256(f"served {model}".encode()).hexdigest()


def server_settings(config: TeacherSource) -> ServerSettings:
    """Take what a teacher's settings say of its servers."""
    return ServerSettings(
        urls=config.url,
        model=config.model,
        engine=config.engine,
        api_key_env=config.api_key_env,
        in_flight=config.in_flight,
        timeout=config.timeout,
        patience=config.patience,
    )


def connected(config: TeacherConfig, pair: TokenizerPair) -> Connection:
    """Connect to the servers of a teacher. Raises as `teachers.served.connect`."""
    method, k = config.method_class, 1
    wanted = config.method_options.get("top_k")
    if method.reads_top_k():
        k = wanted or min(DEFAULT_TOP_K, pair.vocab_t - 1, pair.vocab_s)
    return connect(server_settings(config), pair.teacher, k=k, at_most=wanted is None)


@dataclass(frozen=True, slots=True, eq=False)
class AnswersOf:
    """Rows whose answers are kept, and the folder for them."""

    folder: Path
    rows: Rows
    data: str
    """What the rows are called."""
    may_replace: bool
    """Whether what is there may go, where it is of another model or other rows."""


def served(
    config: TeacherConfig,
    connection: Connection,
    side: TokenizerSide,
    data: DataConfig,
    answers: AnswersOf | None,
) -> Served:
    """Make the teacher of a run; without `answers` nothing is kept. BadArtifact for a cache of other answers."""
    cache = None
    if answers is not None:
        header = _header(config, connection, side, data, answers)
        _check_there(answers, header, connection)
        cache = ReadThroughCache(answers.folder, header)
    return Served(connection.client, k=connection.k, cache=cache)


def _header(
    config: TeacherConfig, connection: Connection, side: TokenizerSide, data: DataConfig, answers: AnswersOf
) -> CacheHeader:
    named = {"tokenizer": side.view.fingerprint, "data": answers.rows.fingerprint}
    return CacheHeader(
        code=code_fingerprint(*FORMAT.code),
        model=config.model,
        model_fingerprint=served_fingerprint(config.model),
        teacher_dtype=SERVED,
        tokenizer=side.view.name,
        tokenizer_fingerprint=side.view.fingerprint,
        vocab=side.view.vocab_size,
        data=answers.data,
        data_fingerprint=answers.rows.fingerprint,
        rows=len(answers.rows),
        limit=None,
        template=data.template,
        template_fingerprint=template_fingerprint(side, data.template),
        k=connection.k,
        dtype="float32",  # as the servers' own: a row is the same when it comes from here
        quantised=False,
        max_length=data.max_length,
        rows_per_shard=ROWS_PER_SHARD,
        probe=connection.probe,
        provenance=dict(provenance(fingerprints=named)),
    )


def other_probe(there: CacheHeader, connection: Connection) -> list[str]:
    """Say where answers that are there are of another model than is served now."""
    if not other_model(there.probe or (), connection.probe):
        return []
    return [f"its answers are of another {there.model} than is served now"]


def _check_there(answers: AnswersOf, header: CacheHeader, connection: Connection) -> None:
    """See that answers that are there are this model's, for these rows. BadArtifact where they must not go."""
    folder = answers.folder
    if not (folder / HEADER_FILE).is_file():
        return
    there = read_header(folder)
    differences = [*there.differences(header), *other_probe(there, connection)]
    if differences and answers.may_replace:
        shutil.rmtree(folder)
    elif differences:
        problem = f"it holds other answers: {'; '.join(differences)}"
        raise BadArtifact(
            folder, problem, "give another folder as `cache`, or serve the model that they are of"
        )
