"""lm-eval tasks as a suite: item by item, on an already loaded model.

Prompts, filters and metrics are lm-eval's own. Its evaluation is split only so that a killed run can resume: requests
are answered batch by batch, and each document is scored as soon as it is answered. The totals are computed by
lm-eval's evaluation of a model that replays the stored answers.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import Field

from cdm_toolkit.artifacts.settings import Settings
from cdm_toolkit.batching import TOKENS_AT_ONCE, batches, scored_positions
from cdm_toolkit.errors import BadOption, FileProblem, MissingExtra, NoData, UnsupportedTokenizer
from cdm_toolkit.evaluation.evaluate import Ask, Contents, Subject, fingerprint, refuse
from cdm_toolkit.evaluation.gsm8k import (
    DRAWS_EXAMPLES,
    PREFIX,
    TASK_FILES,
    Problems,
    check_shots,
    find_problems,
    own_fewshot,
    write_task,
)
from cdm_toolkit.evaluation.scores import Item, Score, Summary
from cdm_toolkit.evaluation.suites import SuiteSpec

FEWSHOT_SEED = 1234
"""lm-eval's default."""
BOOTSTRAPS = 1000
"""Bootstrap samples for the standard error of metrics that are not means, such as corpus F1."""
MAX_NEW_TOKENS = 256
"""lm-eval's default, for tasks without a setting."""


class LmEvalSettings(Settings):
    """The settings of a suite of lm-eval tasks."""

    tasks: tuple[str, ...] = Field(default=("gsm8k",), min_length=1)
    """Default tasks."""
    fewshot: int | None = Field(default=None, ge=0)
    """Few-shot examples; by default the number of each task."""
    fewshot_split: str | None = None
    """GSM8K: the hub split for few-shot examples, if the rows are from the hub too."""
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, ge=1)
    """GSM8K: maximum length of an answer. Other tasks have their own."""
    stop: tuple[str, ...] | None = None
    """GSM8K: stop strings; by default those of lm-eval's task."""


class LmEval:
    """Suite adapter for lm-eval tasks: GSM8K on rows from a file, all others on their own data."""

    Settings = LmEvalSettings

    def __init__(self, spec: SuiteSpec, ask: Ask) -> None:
        if find_spec("lm_eval") is None:
            raise MissingExtra("lm-eval", "eval", f"the suite {spec.name!r}")
        self._spec, self._ask = spec, ask
        self._settings: LmEvalSettings = spec.settings
        names = list(dict.fromkeys(ask.tasks or self._settings.tasks))
        ours = [name for name in names if name in TASK_FILES]
        theirs = [name for name in names if name not in TASK_FILES]
        if theirs and ask.data is not None:
            raise BadOption("data", str(ask.data), f"no `data`: {', '.join(theirs)} has data of its own")
        if not theirs:
            refuse(spec, ask, "include_path")
        if DRAWS_EXAMPLES not in ours:
            refuse(spec, ask, "fewshot_data")
        self._folder = tempfile.TemporaryDirectory(prefix="cdm-lm-eval-")  # deleted together with the tasks
        problems = find_problems(spec, ask) if ours else None
        with quiet_lm_eval():
            found = [self._ours(ours, problems)] if problems else []
            found += [self._theirs(theirs)] if theirs else []
        self._tasks: dict[str, Any] = {name: task for each in found for name, task in each["tasks"].items()}
        self._groups: dict[str, Any] = {
            name: group for each in found for name, group in each["groups"].items()
        }
        self.contents = self._contents(names, problems)

    def score(self, subject: Subject, keys: Sequence[str]) -> Iterator[Item]:
        if self._ask.chat_template and not subject.tokenizer.chat_template:
            raise UnsupportedTokenizer(
                subject.name, "it has no chat template", "score it without `chat_template`"
            )
        with quiet_lm_eval():
            yield from self.answer(wrap_model(subject), keys)

    def answer(self, lm: Any, keys: Sequence[str]) -> Iterator[Item]:
        """Score any `lm_eval.api.model.LM`, such as a stub in tests."""
        requests = self._requests(lm)
        wanted = set(keys)
        names = list(requests)
        lengths = [sum(_length(lm, request) for request in requests[name]) for name in names]
        positions = _batch_positions(lm, requests.values())
        size = self._ask.batch_size
        for batch in batches(lengths, size, tokens=None if size else positions):
            together = [names[index] for index in batch]
            if wanted.isdisjoint(together):
                continue
            answers = _answers(lm, [requests[name] for name in together], self._ask.batch_size, positions)
            for name, responses in zip(together, answers, strict=True):
                if name in wanted:
                    yield self._item(lm, name, requests[name], responses)

    def summarize(self, items: Sequence[Item]) -> Summary:
        from lm_eval.evaluator import evaluate

        with quiet_lm_eval(), redirect_stderr(StringIO()):
            outcome = evaluate(
                lm=_repeating(items),
                task_dict={"tasks": self._tasks, "groups": self._groups, "group_map": {}},
                limit=self._ask.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        scores = [
            Score(
                self._metric(name, metric),
                float(value),
                _number(values.get(metric.replace(",", "_stderr,", 1))),
                int(values["sample_len"]),
                bool(outcome["higher_is_better"].get(name, {}).get(metric.partition(",")[0], True)),
            )
            for name in (*self._groups, *self._tasks)
            for values in (outcome["results"].get(name, {}),)  # a group without aggregates has none
            for metric, value in values.items()
            if "," in metric and "_stderr," not in metric and isinstance(value, int | float)
        ]
        cut = [item.details["cut_to"] for item in items if item.details.get("cut_to")]
        note = f"{len(cut)} of {len(items)} prompts were cut to their last {min(cut)} tokens" if cut else ""
        return Summary(tuple(scores), (note,) if note else ())

    def _ours(self, names: Sequence[str], problems: Problems) -> Any:
        """Write the GSM8K tasks and load them."""
        from lm_eval.tasks import TaskManager

        settings, folder = self._settings, Path(self._folder.name)
        if DRAWS_EXAMPLES in names:
            check_shots(problems, self._shots(DRAWS_EXAMPLES), self._ask.fewshot_data)
        written = [
            write_task(
                folder,
                name,
                problems,
                fewshot=settings.fewshot,
                max_new_tokens=settings.max_new_tokens,
                stop=settings.stop,
            )
            for name in names
        ]
        with redirect_stderr(StringIO()):  # progress bars of a fraction of a second
            return TaskManager(include_path=str(folder), include_defaults=False).load(written)

    def _theirs(self, names: Sequence[str]) -> Any:
        """Load tasks by name, lm-eval's own and those of a folder."""
        with redirect_stderr(StringIO()):
            manager = _task_manager(names, self._ask.include_path)
            try:
                loaded = manager.load(list(names))
            except Exception as error:  # of many kinds: offline, no such data set, gated, a faulty task file
                why = " ".join(str(error).split()) or type(error).__name__
                raise NoData(
                    self._spec.name,
                    [f"the tasks {', '.join(names)}: {why}"],
                    "",
                    fix="fetch it where there is a network, or give a folder of tasks on local files as `include_path`",
                ) from None
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise BadOption("tasks", name, "a task that runs no code of the model's: `suite='code'` does")
            if self._settings.fewshot is not None:
                task.set_config(key="num_fewshot", value=self._settings.fewshot)
        return loaded

    def _contents(self, names: Sequence[str], problems: Problems | None) -> Contents:
        docs = {name: list(task.eval_docs)[: self._ask.limit] for name, task in self._tasks.items()}
        keys = tuple(
            f"{name.removeprefix(PREFIX)}/{n}" for name, rows in docs.items() for n in range(len(rows))
        )
        data = [problems.data] if problems else []
        data += [str(task.config.dataset_path) for name, task in self._tasks.items() if PREFIX not in name]
        setting = [f"{name} {self._shots_shown(name, problems)}".strip() for name in names]
        shots = [[row.prompt, row.completion] for row in problems.shots] if problems else []
        made_of = [version("lm_eval"), docs, shots, self._settings.model_dump(mode="json"), list(names)]
        return Contents(keys, ", ".join(dict.fromkeys(data)), "; ".join(setting), fingerprint(made_of))

    def _shots(self, name: str) -> int:
        return self._settings.fewshot if self._settings.fewshot is not None else own_fewshot(name)

    def _shots_shown(self, name: str, problems: Problems | None) -> str:
        """Describe the number of few-shot examples and their source."""
        if name in TASK_FILES:
            count = self._shots(name)
            drawn = bool(count) and name == DRAWS_EXAMPLES and problems is not None
            return f"{count}-shot" + (f" from {problems.shots_source}" if drawn and problems else "")
        return f"{self._tasks[name].config.num_fewshot or 0}-shot" if name in self._tasks else ""

    def _requests(self, lm: Any) -> dict[str, list[Any]]:
        """Build the requests of every item, in the order of the keys, as lm-eval does."""
        requests: dict[str, list[Any]] = {}
        for name, task in self._tasks.items():
            task.set_fewshot_seed(FEWSHOT_SEED)
            with redirect_stderr(StringIO()):
                task.build_all_requests(
                    limit=self._ask.limit,
                    apply_chat_template=self._ask.chat_template,
                    chat_template=lm.apply_chat_template if self._ask.chat_template else None,
                    tokenizer_name=lm.tokenizer_name if self._ask.chat_template else "",
                )
            for request in task.instances:
                requests.setdefault(f"{name.removeprefix(PREFIX)}/{request.doc_id}", []).append(request)
        for made in requests.values():
            made.sort(key=lambda request: int(request.idx))
            _check_room(lm, made, self._spec.name)
        return requests

    def _item(self, lm: Any, key: str, requests: list[Any], responses: list[list[Any]]) -> Item:
        """Score one document with its task's filters and metrics."""
        task = self._tasks[requests[0].task_name]
        for request, given in zip(requests, responses, strict=True):
            request.resps, request.filtered_resps = list(given), {}
        task._instances = requests  # what apply_filters reads
        task.apply_filters()
        doc = requests[0].doc
        scores: dict[str, float] = {}
        others: dict[str, Any] = {}
        filtered: dict[str, Any] = {}
        for name in requests[0].filtered_resps:
            selected = [request.filtered_resps[name] for request in requests]
            filtered[name] = selected
            for metric, value in task.process_results(doc, selected).items():
                if isinstance(value, int | float):
                    scores[f"{metric},{name}"] = float(value)
                else:
                    others[f"{metric},{name}"] = value
        texts = [text for given in responses for text in given if isinstance(text, str)]
        details: dict[str, Any] = {"filtered": filtered, "cut_to": _cut_to(lm, requests)}
        if responses != [[(generation := "\n".join(texts))]]:
            details["responses"] = responses
        return Item(
            key,
            scores=scores,
            prompt=str(requests[0].args[0]),
            generation=generation,
            reference=str(task.doc_to_target(doc)),
            details=_as_json(details | ({"metrics": others} if others else {})),
        )

    def _metric(self, task: str, name: str) -> str:
        """Name a metric as lm-eval does: with its filter, and with the task where there are several."""
        metric, _, chosen = name.partition(",")
        shown = metric if chosen == "none" else f"{metric}, {chosen}"
        several = len(self._tasks) + len(self._groups) > 1
        return f"{task.removeprefix(PREFIX)}: {shown}" if several else shown


def _task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """Create the TaskManager for some tasks. Raises FileProblem for a missing folder, BadOption for an unknown name.

    lm-eval's thousands of task files are indexed only if the folder does not have all tasks, because it takes seconds.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not folder.is_dir():
            raise FileProblem(folder, "there is no such folder", "give one that holds task files of lm-eval")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(get_close_matches(name, manager.all_tasks, n=3)) or "arc_easy, hellaswag"
            raise BadOption("tasks", name, f"a task that lm-eval has, such as {near}")
    return manager


def wrap_model(subject: Subject) -> Any:
    """Wrap a loaded model for lm-eval, without progress bars. The caller sets the batch size."""
    from lm_eval.models.huggingface import HFLM

    class LoadedModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            answers: list[str] = super().generate_until(requests, disable_tqdm=True)
            return answers

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
            return found

    return LoadedModel(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1)


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Log only errors of lm-eval and its libraries inside the block."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _batch_positions(lm: Any, groups: Iterable[Sequence[Any]]) -> int:
    """Return the batch size in positions: smaller where a task scores the logits at all positions."""
    generates = all(request.request_type == "generate_until" for group in groups for request in group)
    if generates or not hasattr(lm, "model"):
        return TOKENS_AT_ONCE
    return scored_positions(int(lm.model.get_input_embeddings().weight.shape[0]))


def _answers(
    lm: Any, groups: Sequence[Sequence[Any]], batch_size: int | None, positions: int
) -> list[list[list[Any]]]:
    """Run all requests of some items; return the responses of each item, by request."""
    kinds: dict[str, list[Any]] = defaultdict(list)
    for group in groups:
        for request in group:
            kinds[request.request_type] += [request] * request.repeats
    given: dict[int, list[Any]] = defaultdict(list)
    for kind, requests in kinds.items():
        longest = max(_length(lm, request) for request in requests)
        lm.batch_size_per_gpu = batch_size or max(1, min(len(requests), positions // longest))
        for request, answer in zip(requests, getattr(lm, kind)(requests), strict=True):
            given[id(request)].append(answer)
    return [[given[id(request)] for request in group] for group in groups]


def _repeating(items: Sequence[Item]) -> Any:
    """Make an lm-eval model that replays the responses of finished items."""
    from lm_eval.api.model import LM

    held: dict[tuple[str, int], list[deque[Any]]] = {}
    for item in items:
        task, _, number = item.key.rpartition("/")
        responses = item.details.get("responses", [[item.generation]])
        held[task, int(number)] = [deque(answers) for answers in responses]

    def repeat(requests: Sequence[Any]) -> list[Any]:
        answers = []
        for request in requests:
            answer = held[request.task_name.removeprefix(PREFIX), request.doc_id][request.idx].popleft()
            answers.append(tuple(answer) if isinstance(answer, list) else answer)
        return answers

    class Repeating(LM):  # type: ignore[misc]  # lm-eval has no types
        def generate_until(self, requests: Any) -> list[str]:
            return repeat(requests)

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return repeat(requests)

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return repeat(requests)

    return Repeating()


def _length(lm: Any, request: Any) -> int:
    """Return the length of a request: in tokens, or in characters if the model has no tokenizer."""
    count = lm.tok_encode if hasattr(lm, "tok_encode") else str
    texts = [text for text in request.args if isinstance(text, str)]
    return sum(len(count(text)) for text in texts) + _new_tokens(request)


def _new_tokens(request: Any) -> int:
    if request.request_type != "generate_until":
        return 0
    return int(request.args[1].get("max_gen_toks", MAX_NEW_TOKENS))


def _check_room(lm: Any, requests: Sequence[Any], suite: str) -> None:
    """Raise BadOption where a model has too few positions for the answer length of a task."""
    longest = max(map(_new_tokens, requests))
    if longest and getattr(lm, "max_length", math.inf) <= longest:
        raise BadOption(
            f"max_new_tokens of the suite {suite!r}",
            longest,
            f"less than the {lm.max_length} positions of the model",
        )


def _cut_to(lm: Any, requests: Sequence[Any]) -> int | None:
    """Return the length to which lm-eval truncates a prompt to make room for the answer; None if it does not."""
    if not hasattr(lm, "tok_encode") or requests[0].request_type != "generate_until":
        return None
    room = int(lm.max_length) - max(map(_new_tokens, requests))
    return room if len(lm.tok_encode(requests[0].args[0])) > room else None


def _as_json(details: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values to JSON types, so that they are unchanged by writing and reading."""
    made: dict[str, Any] = json.loads(json.dumps(details, default=str))
    return made


def _number(value: object) -> float | None:
    """Read a standard error, which lm-eval gives as "N/A" where it has none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
