"""GSM8K, scored by lm-eval on a model that is loaded already.

The task is lm-eval's own file: prompt, filters and metric are inherited, the rows are ours. lm-eval draws the
few-shot examples for each question from a training split, seeded with its default 1234. They come from the
file that the caller gives, else from the training split that belongs to the hub's data, else from the word
problems that the project wrote; the result says which.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from cdm_toolkit.distill.rows import Row, read_rows
from cdm_toolkit.errors import BadOption, BadRow, FileProblem, MissingExtra, NoData
from cdm_toolkit.evaluation.data import DataFile, find_data, hub_file
from cdm_toolkit.evaluation.results import Score, SuiteResult
from cdm_toolkit.evaluation.run import Ask, Progress, Subject
from cdm_toolkit.evaluation.suites import SuiteSpec
from cdm_toolkit.samples import sample_path

FEWSHOT_SEED = 1234  # lm-eval's default
TASK = "cdm_gsm8k"
EXTRACTIONS = ("strict-match", "flexible-extract")
ANSWER = re.compile(r"#### -?[0-9.,]+\s*$")


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold the settings of a GSM8K suite."""

    fewshot: int = field(default=5, metadata={"at_least": 0})
    fewshot_split: str | None = None
    """The hub's split that few-shot examples come from when the rows come from the hub."""
    max_new_tokens: int = field(default=256, metadata={"at_least": 1})
    stop: tuple[str, ...] = ("Question:",)


class Gsm8k:
    """Score models by the share of GSM8K's questions whose number they find."""

    Settings = Settings

    def __init__(self, spec: SuiteSpec, ask: Ask) -> None:
        if find_spec("lm_eval") is None:
            raise MissingExtra("lm-eval", "eval", f"the suite {spec.name!r}")
        self._name = spec.name
        self._settings: Settings = spec.settings
        data = find_data(spec, ask.data, "question and answer")
        self._data = data.source
        self._rows = read_problems(data.path)[: ask.limit]
        shots = _fewshot_file(spec, ask, data)
        asked = {row.prompt for row in self._rows}  # lm-eval looks for these in the test split alone
        self._shots = [row for row in read_problems(shots.path) if row.prompt not in asked]
        count = self._settings.fewshot
        if len(self._shots) < max(count, 1):  # the split must be there even if no example is drawn
            raise FileProblem(
                shots.path,
                f"it has {len(self._shots)} rows besides the scored ones, the suite needs {count} examples",
                "give another --fewshot-data",
            )
        self._setting = f"{count}-shot from {shots.source}" if count else "0-shot"

    def score(self, subject: Subject, *, batch_size: int, progress: Progress | None) -> SuiteResult:
        positions = getattr(subject.model.config, "max_position_embeddings", None)
        if positions is not None and positions <= self._settings.max_new_tokens:
            raise BadOption(
                f"max_new_tokens of the suite {self._name!r}",
                self._settings.max_new_tokens,
                f"less than the {positions} positions of {subject.name}",
            )
        with quiet_lm_eval():
            lm = wrap_model(subject, batch_size, len(self._rows), progress)
            return self.score_lm(lm, subject.name)

    def score_lm(self, lm: Any, name: str) -> SuiteResult:
        """Score any `lm_eval.api.model.LM`, such as a stand-in."""
        from lm_eval.evaluator import evaluate

        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="cdm-gsm8k-") as folder, quiet_lm_eval():
            task = load_task(Path(folder), self._rows, self._shots, self._settings)
            outcome = evaluate(lm=lm, task_dict={"tasks": {TASK: task}}, bootstrap_iters=1, log_samples=False)
        seconds = time.perf_counter() - began
        values = outcome["results"][TASK]
        scores = tuple(
            Score(
                f"exact match, {extraction.partition('-')[0]}",
                float(values[f"exact_match,{extraction}"]),
                _number(values.get(f"exact_match_stderr,{extraction}")),
                len(self._rows),
                seconds,
                higher_is_better=True,
            )
            for extraction in EXTRACTIONS
        )
        return SuiteResult(
            self._name, name, scores, self._data, self._setting, _cut_prompts(lm, task, self._settings)
        )


def load_task(folder: Path, rows: Sequence[Row], shots: Sequence[Row], settings: Settings) -> Any:
    """Write a task file that includes lm-eval's own beside its data, and load it.

    `lm_eval --tasks cdm_gsm8k --include_path FOLDER` runs the same task from the command line.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    files = {"test": folder / "test.jsonl", "train": folder / "train.jsonl"}
    for split, problems in (("test", rows), ("train", shots)):
        files[split].write_text("".join(map(_as_gsm8k, problems)), encoding="utf-8")
    task: dict[str, object] = {
        "include": str(Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"),
        "task": TASK,
        "tag": [],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items()},
            "cache_dir": str(folder / "cache"),
        },
        "num_fewshot": settings.fewshot,
        # one mapping replaces the other as a whole
        "generation_kwargs": {
            "until": list(settings.stop),
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": settings.max_new_tokens,
        },
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    with redirect_stderr(StringIO()):  # progress bars of a fraction of a second
        loaded = TaskManager(include_path=str(folder), include_defaults=False).load([TASK])["tasks"][TASK]
    loaded.set_fewshot_seed(FEWSHOT_SEED)
    build = loaded.build_all_requests

    def build_quietly(**asked: Any) -> None:
        with redirect_stderr(StringIO()):
            build(**asked)

    loaded.build_all_requests = build_quietly
    return loaded


def wrap_model(subject: Subject, batch_size: int, count: int, progress: Progress | None) -> Any:
    """Make lm-eval's model of one that is loaded, which tells our progress instead of drawing a bar."""
    from lm_eval.models.huggingface import HFLM

    class LoadedModel(HFLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            answers: list[str] = super().generate_until(requests, disable_tqdm=True)
            return answers

    class Told:
        """Stands where lm-eval's cache is told of each answer."""

        done = 0

        def add_partial(self, attribute: str, request: object, answer: object) -> None:
            self.done += 1
            if progress:
                progress(self.done, count)

    lm = LoadedModel(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size)
    lm.set_cache_hook(Told())
    return lm


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keep lm-eval's log to errors while it works for us."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_problems(path: Path) -> list[Row]:
    """Read questions with answers that end with `#### N`. Raises FileProblem and BadRow."""
    rows = read_rows(path)
    for row in rows:
        if not row.prompt:
            raise BadRow(path, row.number, "it has no question", "give each row question and answer")
        if not ANSWER.search(row.completion):
            raise BadRow(
                path, row.number, "its answer does not end with #### and a number", "end it with #### 42"
            )
    return rows


def _fewshot_file(spec: SuiteSpec, ask: Ask, data: DataFile) -> DataFile:
    if ask.fewshot_data is not None:
        return DataFile(ask.fewshot_data, str(ask.fewshot_data))
    if data.from_hub and spec.settings.fewshot_split is not None:
        found = hub_file(spec.data, spec.settings.fewshot_split)
        if isinstance(found, DataFile):
            return found
        raise NoData(
            spec.name, [f"{spec.data.hub} {spec.settings.fewshot_split}: {found}"], "question and answer"
        )
    path = sample_path("train")
    return DataFile(path, f"{path.name} (cdm_toolkit.samples)")


def _as_gsm8k(row: Row) -> str:
    return json.dumps({"question": row.prompt, "answer": row.completion}) + "\n"


def _number(value: object) -> float | None:
    """Read a standard error, which lm-eval gives as "N/A" for one item."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _cut_prompts(lm: Any, task: Any, settings: Settings) -> tuple[str, ...]:
    """Say how many prompts lm-eval cut on the left to leave room for the answer."""
    if not hasattr(lm, "tok_encode"):
        return ()
    room = lm.max_length - settings.max_new_tokens
    cut = sum(len(lm.tok_encode(instance.args[0])) > room for instance in task.instances)
    return (f"{cut} of {len(task.instances)} prompts were cut to their last {room} tokens",) if cut else ()
