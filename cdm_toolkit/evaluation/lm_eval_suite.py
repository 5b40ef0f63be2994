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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from functools import partial
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
from cdm_toolkit.evaluation.gsm8k import DRAWS_EXAMPLES, TASK_FILES, find_problems, write_task
from cdm_toolkit.evaluation.scores import Item, Score, Summary
from cdm_toolkit.evaluation.suites import SuiteSpec

FEWSHOT_SEED = 1234
"""lm-eval's default."""
BOOTSTRAPS = 1000
"""Bootstrap samples for the standard error of metrics that are not means, such as corpus F1."""
MAX_NEW_TOKENS = 256
"""lm-eval's default, for tasks without a setting."""
KINDS = ("generate_until", "loglikelihood", "loglikelihood_rolling")
"""What lm-eval asks of a model."""


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


class LmEval:
    """Suite adapter for lm-eval tasks: GSM8K on rows from a file, all others on their own data."""

    Settings = LmEvalSettings

    def __init__(self, spec: SuiteSpec, ask: Ask) -> None:
        if find_spec("lm_eval") is None:
            raise MissingExtra("lm-eval", "eval", f"the suite {spec.name!r}")
        self._spec, self._ask = spec, ask
        self._settings: LmEvalSettings = spec.settings
        self._names = tuple(dict.fromkeys(ask.tasks or self._settings.tasks))
        theirs = [name for name in self._names if name not in TASK_FILES]
        if theirs and ask.data is not None:
            raise BadOption("data", str(ask.data), f"no `data`: {', '.join(theirs)} has data of its own")
        if not theirs:
            refuse(spec, ask, "include_path")
        if DRAWS_EXAMPLES not in self._names:
            refuse(spec, ask, "fewshot_data")
        self._problems = find_problems(spec, ask) if len(theirs) < len(self._names) else None
        self._folder = tempfile.TemporaryDirectory(prefix="cdm-lm-eval-")  # deleted together with the tasks
        self._loaded = self._load(theirs)
        self._tasks: dict[str, Any] = self._loaded["tasks"]
        self.contents = self._contents()

    def score(self, subject: Subject, keys: Sequence[str]) -> Iterator[Item]:
        if self._ask.chat_template and not subject.tokenizer.chat_template:
            raise UnsupportedTokenizer(
                subject.name, "it has no chat template", "score it without `chat_template`"
            )
        with quiet_lm_eval():
            yield from self.answer(wrap_model(subject), keys)

    def answer(self, lm: Any, keys: Sequence[str]) -> Iterator[Item]:
        """Score an `lm_eval.api.model.TemplateLM`."""
        requests = self._requests(lm)
        names = list(requests)
        lengths = [sum(_length(lm, request) for request in requests[name]) for name in names]
        positions = _batch_positions(lm, requests.values())
        size = self._ask.batch_size
        for batch in batches(lengths, size, tokens=None if size else positions):
            together = [names[index] for index in batch]
            if not set(keys).isdisjoint(together):
                answers = _answers(lm, [requests[name] for name in together], size, positions)
                for name, responses in zip(together, answers, strict=True):
                    if name in keys:
                        yield self._item(lm, name, requests[name], responses)

    def summarize(self, items: Sequence[Item]) -> Summary:
        from lm_eval.evaluator import evaluate

        with quiet_lm_eval(), redirect_stderr(StringIO()):
            outcome = evaluate(
                lm=_repeating(items),
                task_dict=self._loaded | {"group_map": {}},
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
            for name in (*self._loaded["groups"], *self._tasks)
            for values in (outcome["results"].get(name, {}),)  # a group without aggregates has none
            for metric, value in values.items()
            if "," in metric and "_stderr," not in metric and isinstance(value, int | float)
        ]
        cut = [item.details["cut_to"] for item in items if item.details.get("cut_to")]
        note = f"{len(cut)} of {len(items)} prompts were cut to their last {min(cut)} tokens" if cut else ""
        return Summary(tuple(scores), (note,) if note else ())

    def _load(self, theirs: Sequence[str]) -> Any:
        """Load the tasks: GSM8K's from files written here, the others by name, lm-eval's own and those of a folder."""
        folder, settings = Path(self._folder.name), self._settings
        wanted = list(self._names)
        for at, name in enumerate(wanted):
            if self._problems and name in TASK_FILES:
                fewshot, longest = settings.fewshot, settings.max_new_tokens
                file = write_task(folder, name, self._problems, fewshot=fewshot, max_new_tokens=longest)
                wanted[at] = str(file)
        with quiet_lm_eval(), redirect_stderr(StringIO()):  # progress bars of a fraction of a second
            manager = _task_manager(theirs, self._ask.include_path)
            try:
                loaded = manager.load(wanted)
            except Exception as error:  # of many kinds: offline, no such data set, gated, a faulty task file
                why = " ".join(str(error).split()) or type(error).__name__
                raise NoData(
                    self._spec.name,
                    [f"the tasks {', '.join(self._names)}: {why}"],
                    "",
                    fix="fetch it where there is a network, or give a folder of tasks on local files as `include_path`",
                ) from None
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise BadOption("tasks", name, "a task that runs no code of the model's: `suite='code'` does")
            if settings.fewshot is not None:
                task.set_config(key="num_fewshot", value=settings.fewshot)
        return loaded

    def _contents(self) -> Contents:
        docs = {name: list(task.eval_docs)[: self._ask.limit] for name, task in self._tasks.items()}
        keys = tuple(f"{name}/{n}" for name, rows in docs.items() for n in range(len(rows)))
        data = [self._problems.data] if self._problems else []
        ours = set(self._names) & TASK_FILES.keys()
        data += [str(task.config.dataset_path) for name, task in self._tasks.items() if name not in ours]
        shots = [[row.prompt, row.completion] for row in self._problems.shots] if self._problems else []
        made_of = [version("lm_eval"), docs, shots, self._settings.model_dump(mode="json"), self._names]
        setting = "; ".join(map(self._shown, self._names))
        return Contents(keys, ", ".join(dict.fromkeys(data)), setting, fingerprint(made_of))

    def _shown(self, name: str) -> str:
        """Name a task with its number of few-shot examples and their source."""
        if name not in self._tasks:
            return name
        count = self._tasks[name].config.num_fewshot or 0
        drawn = self._problems if count and name == DRAWS_EXAMPLES else None
        return f"{name} {count}-shot" + (f" from {drawn.shots_source}" if drawn else "")

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
                requests.setdefault(f"{name}/{request.doc_id}", []).append(request)
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
        filtered = {
            name: [request.filtered_resps[name] for request in requests]
            for name in requests[0].filtered_resps
        }
        scores = {
            f"{metric},{name}": float(value)
            for name, selected in filtered.items()
            for metric, value in task.process_results(doc, selected).items()
            if isinstance(value, int | float)
        }
        texts = [text for given in responses for text in given if isinstance(text, str)]
        details: dict[str, Any] = {"filtered": filtered, "cut_to": _cut_to(lm, requests)}
        if responses != [[(generation := "\n".join(texts))]]:
            details["responses"] = responses
        details = json.loads(json.dumps(details, default=str))  # JSON types, as they come back from the disk
        return Item(
            key,
            scores=scores,
            prompt=str(requests[0].args[0]),
            generation=generation,
            reference=str(task.doc_to_target(doc)),
            details=details,
        )

    def _metric(self, task: str, name: str) -> str:
        """Name a metric as lm-eval does: with its filter, and with the task where there are several."""
        metric, _, chosen = name.partition(",")
        shown = metric if chosen == "none" else f"{metric}, {chosen}"
        several = len(self._tasks) + len(self._loaded["groups"]) > 1
        return f"{task}: {shown}" if several else shown


def _task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """Create the TaskManager for some tasks. Raises FileProblem for a missing folder, BadOption for an unknown name.

    lm-eval's thousands of task files are indexed only if the folder does not have all tasks, because it takes seconds.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise FileProblem(folder, "there is no such folder", "give one that holds task files of lm-eval")
    path = str(folder) if folder else None
    manager = TaskManager(include_path=path, include_defaults=False)
    if set(names) <= set(manager.all_subtasks):
        return manager
    manager = TaskManager(include_path=path)
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(get_close_matches(name, manager.all_tasks, n=3)) or "arc_easy, hellaswag"
            raise BadOption("tasks", name, f"a task that lm-eval has, such as {near}")
    return manager


def wrap_model(subject: Subject) -> Any:
    """Wrap a loaded model for lm-eval, without progress bars. The caller sets the batch size."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1)
    for kind in KINDS:
        setattr(lm, kind, partial(getattr(lm, kind), disable_tqdm=True))
    return lm


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
    if all(request.request_type == "generate_until" for group in groups for request in group):
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

    held: dict[str, list[deque[Any]]] = {}
    for item in items:
        responses = item.details.get("responses", [[item.generation]])
        held[item.key] = [deque(answers) for answers in responses]

    def repeat(lm: object, requests: Sequence[Any]) -> list[Any]:
        answers = []
        for request in requests:
            answer = held[f"{request.task_name}/{request.doc_id}"][request.idx].popleft()
            answers.append(tuple(answer) if isinstance(answer, list) else answer)
        return answers

    return type("Repeating", (LM,), dict.fromkeys(KINDS, repeat))()


def _length(lm: Any, request: Any) -> int:
    """Return the length of a request in tokens."""
    texts = [text for text in request.args if isinstance(text, str)]
    return sum(len(lm.tok_encode(text)) for text in texts) + _new_tokens(request)


def _new_tokens(request: Any) -> int:
    if request.request_type != "generate_until":
        return 0
    return int(request.args[1].get("max_gen_toks", MAX_NEW_TOKENS))


def _check_room(lm: Any, requests: Sequence[Any], suite: str) -> None:
    """Raise BadOption where a model has too few positions for the answer length of a task."""
    longest = max(map(_new_tokens, requests))
    if longest and lm.max_length <= longest:
        allowed = f"less than the {lm.max_length} positions of the model"
        raise BadOption(f"max_new_tokens of the suite {suite!r}", longest, allowed)


def _cut_to(lm: Any, requests: Sequence[Any]) -> int | None:
    """Return the length to which lm-eval truncates a prompt to make room for the answer; None if it does not."""
    if requests[0].request_type != "generate_until":
        return None
    room = int(lm.max_length) - max(map(_new_tokens, requests))
    return room if len(lm.tok_encode(requests[0].args[0])) > room else None


def _number(value: object) -> float | None:
    """Read a standard error, which lm-eval gives as "N/A" where it has none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
