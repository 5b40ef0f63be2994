"""Score models on a suite: its file names an adapter, which has the protocol `Suite`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cdm_toolkit.errors import BadOption
from cdm_toolkit.evaluation.results import SuiteResult
from cdm_toolkit.evaluation.suites import SuiteSpec, adapter_class, load_suite
from cdm_toolkit.tokdiff.view import TokenizerView

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Hold what a caller asks of a suite, beyond its file."""

    data: Path | None = None
    fewshot_data: Path | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """Hold a loaded model with its tokenizer, as transformers' objects and as a view."""

    name: str
    model: Any
    tokenizer: Any
    view: TokenizerView


class Suite(Protocol):
    """Score loaded models. It finds and checks its data when it is made."""

    def __init__(self, spec: SuiteSpec, ask: Ask) -> None: ...

    def score(self, subject: Subject, *, batch_size: int, progress: Progress | None) -> SuiteResult: ...


def open_suite(name: str, ask: Ask = Ask()) -> Suite:
    """Find a suite by name or path and its data, before any model loads.

    Raises UnknownName, BadRunConfig, NoData, BadRow, FileProblem or MissingExtra.
    """
    if ask.limit is not None and ask.limit < 1:
        raise BadOption("--limit", ask.limit, "a number of rows of at least 1")
    spec = load_suite(name)
    suite: Suite = adapter_class(spec.adapter)(spec, ask)
    return suite


def evaluate(
    name: str,
    models: Sequence[str],
    *,
    ask: Ask = Ask(),
    device: str = "cpu",
    batch_size: int = 8,
    progress: Callable[[str], Progress] | None = None,
) -> list[SuiteResult]:
    """Score models side by side on a suite, one after the other in memory.

    `progress` is given a model's name and returns what to call while it is scored.
    """
    if batch_size < 1:
        raise BadOption("--batch-size", batch_size, "a number of at least 1")
    suite = open_suite(name, ask)
    return [
        suite.score(
            load_subject(model, device), batch_size=batch_size, progress=progress(model) if progress else None
        )
        for model in models
    ]


def start_token(tokenizer: Any) -> int | None:
    """Choose what stands before a text, as in training: the beginning-of-sequence token, else the end's."""
    bos: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def load_subject(name: str, device: str = "cpu") -> Subject:
    """Load a model and its tokenizer by alias, path or hub id, in float32."""
    from cdm_toolkit.hub.models import load_model
    from cdm_toolkit.hub.tokenizers import load_tokenizer

    loaded = load_tokenizer(name)
    return Subject(name, load_model(name, device=device), loaded.tokenizer, loaded.view)
