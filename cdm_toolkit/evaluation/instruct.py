"""Instruction following: Rouge-L against reference answers, as reported by DSKD and MiniLLM.

Prompt, lengths, sampling and seeds are those of github.com/songmzhang/DSKD (`scripts/gpt2/eval_main.sh`,
`code/evaluate_main.py`), whose data are MiniLLM's (github.com/microsoft/LMOps): an Alpaca prompt, answers drawn
at temperature 1 with top-p 1, one for each seed of 10, 20, 30, 40, 50, at most 256 tokens. The score of an answer is
the F-measure of rouge-score's Rouge-L with its stemmer, in percent, the best over all references; the score of a data
set is the mean over its rows. The result is the mean over the seeds, ± their standard deviation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import Field

from cdm_toolkit.artifacts.settings import Settings
from cdm_toolkit.errors import BadOption, BadRow, MissingExtra, NoData, UnknownName
from cdm_toolkit.evaluation.evaluate import Ask, Contents, Subject, fingerprint, refuse
from cdm_toolkit.evaluation.generation import GenerationSettings, as_chat, generate_wanted
from cdm_toolkit.evaluation.scores import Item, Score, Summary, mean_score
from cdm_toolkit.evaluation.suite_data import DataFile, read_fields, source_file
from cdm_toolkit.evaluation.suites import DataSource, SuiteSpec

FIELDS = "instruction and output (a text or a list of texts), with or without input"
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PLACEHOLDER = re.compile(r"\{(instruction|input)\}")


class InstructionSet(DataSource):
    """One data set of a suite."""

    folder_file: str | None = None
    """Its file, relative to the folder given as data."""
    first: int | None = Field(default=None, ge=1)
    """Score only the first rows; all if not given."""


class InstructSettings(Settings):
    """The settings of a suite of instructions."""

    sets: dict[str, InstructionSet] = Field(default_factory=dict)
    """The data sets by name."""
    seeds: tuple[int, ...] = Field(default=(10, 20, 30, 40, 50), min_length=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One row: the prompt and its reference answers."""

    prompt: str
    references: tuple[str, ...]


class Instruct:
    """Score models by Rouge-L of their answers to instructions, over data sets and seeds."""

    Settings = InstructSettings

    def __init__(self, spec: SuiteSpec, ask: Ask) -> None:
        if find_spec("rouge_score") is None:
            raise MissingExtra("rouge-score", "eval", f"the suite {spec.name!r}")
        refuse(spec, ask, "fewshot_data", "include_path")
        self._settings: InstructSettings = spec.settings
        self._ask = ask
        files, self._left_out = _find_sets(spec, ask)
        self._rows: dict[str, Instruction] = {}
        for name, (file, first) in files.items():
            bounds = [bound for bound in (first, ask.limit) if bound is not None]
            rows = read_instructions(file.path)[: min(bounds, default=None)]
            self._rows |= {f"{name}/{number}": row for number, row in enumerate(rows, 1)}
        self._seeds = self._settings.seeds if self._settings.temperature > 0 else self._settings.seeds[:1]
        keys = tuple(f"{row}/{seed}" for seed in self._seeds for row in self._rows)
        content = [[key, row.prompt, row.references] for key, row in self._rows.items()]
        data = ", ".join(dict.fromkeys(file.source for file, _ in files.values()))
        self.contents = Contents(keys, data, self._shown(), fingerprint(content))

    def score(self, subject: Subject, keys: Sequence[str]) -> Iterator[Item]:
        settings, chat = self._settings, self._ask.chat_template
        rows = {key: as_chat(subject, row.prompt) if chat else row.prompt for key, row in self._rows.items()}
        for seed in self._seeds:
            prompts = {f"{key}/{seed}": prompt for key, prompt in rows.items()}
            generation = GenerationSettings(
                settings.max_new_tokens, settings.temperature, settings.top_p, seed=seed
            )
            for answers in generate_wanted(subject, prompts, generation, keys, self._ask.batch_size):
                yield from (self.item(key, prompts[key], answer) for key, answer in answers.items())

    def item(self, key: str, prompt: str, answer: str) -> Item:
        """Score one answer."""
        row, _, seed = key.rpartition("/")
        references = self._rows[row].references
        return Item(
            key,
            scores={"rougeL": rouge_l(answer.strip(), references)},
            prompt=prompt,
            generation=answer,
            reference=references[0],
            details={"references": list(references), "seed": int(seed)},
        )

    def summarize(self, items: Sequence[Item]) -> Summary:
        means: dict[str, dict[str, list[float]]] = {}
        for item in items:
            data_set, seed = item.key.rsplit("/", 2)[0], item.key.rpartition("/")[2]
            means.setdefault(data_set, {}).setdefault(seed, []).append(item.scores["rougeL"])
        scores = [_over_seeds(f"Rouge-L, {name}", list(by_seed.values())) for name, by_seed in means.items()]
        if len(scores) > 1:
            value = fmean(score.value for score in scores)
            scores.append(Score("Rouge-L, average", value, None, sum(score.n for score in scores)))
        notes = [f"left out: {each}" for each in self._left_out]
        notes.append("± is the standard deviation over the seeds" if len(self._settings.seeds) > 1 else "")
        return Summary(tuple(scores), tuple(note for note in notes if note))

    def _shown(self) -> str:
        if self._settings.temperature == 0:
            return "greedy"
        drawn = f"temperature {self._settings.temperature:g}, top-p {self._settings.top_p:g}"
        return f"{drawn}, seeds {', '.join(map(str, self._seeds))}"


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return the best Rouge-L F-measure of an answer over its references, in percent."""
    scorer = _scorer()
    return 100 * max(float(scorer.score(each, answer)["rougeL"].fmeasure) for each in references)


@cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _over_seeds(metric: str, by_seed: Sequence[Sequence[float]]) -> Score:
    """Average over seeds, with their standard deviation; with one seed, the standard error over rows."""
    if len(by_seed) == 1:
        return mean_score(metric, by_seed[0])
    values = [fmean(scores) for scores in by_seed]
    return Score(metric, fmean(values), stdev(values), len(by_seed[0]))


def read_instructions(path: Path) -> list[Instruction]:
    """Read instructions with their answers from JSONL. Raises FileProblem and BadRow."""
    return [
        _instruction(path, number, fields)
        for number, fields in read_fields(path, FIELDS, ("instruction",), ("input",))
    ]


def _instruction(path: Path, number: int, fields: Mapping[str, Any]) -> Instruction:
    output = fields.get("output")
    references: list[Any] = output if isinstance(output, list) else [output]
    if not references or not all(isinstance(text, str) for text in references):
        raise BadRow(path, number, "output is no text", "make output a string, or a list of strings")
    template = PROMPT_WITH_INPUT if fields.get("input") else PROMPT
    # One pass, because an instruction may itself contain {input}.
    return Instruction(PLACEHOLDER.sub(lambda found: fields[found[1]], template), tuple(references))


def _find_sets(spec: SuiteSpec, ask: Ask) -> tuple[dict[str, tuple[DataFile, int | None]], list[str]]:
    """Find the files of the data sets; return those that are unavailable as messages.

    `data` is a file, which is then the one set, or a folder that has the sets' files.
    """
    sets = spec.settings.sets
    for name in ask.tasks:
        if name not in sets:
            raise UnknownName("data set", name, tuple(sets))
    if ask.data is not None and not ask.data.is_dir():
        if ask.tasks:
            raise BadOption("tasks", " ".join(ask.tasks), "no `tasks` where `data` is one file")
        return {ask.data.stem: (DataFile(ask.data, str(ask.data)), None)}, []
    tried = {name: _find_set(spec, sets[name], ask.data) for name in ask.tasks or sets}
    found = {name: (file, sets[name].first) for name, file in tried.items() if isinstance(file, DataFile)}
    missing = [
        f"{name} ({'; '.join(file) or 'no source'})" for name, file in tried.items() if isinstance(file, list)
    ]
    if not found or (missing and ask.tasks):
        raise NoData(spec.name, missing if ask.data else ["`data`: not given", *missing], FIELDS)
    return found, missing


def _find_set(spec: SuiteSpec, source: InstructionSet, folder: Path | None) -> DataFile | list[str]:
    if folder is None:
        return source_file(source, spec.path.parent)
    if source.folder_file is None:
        return ["no folder_file in the suite"]
    path = folder / source.folder_file
    return DataFile(path, str(path)) if path.is_file() else [f"{path}: there is no such file"]
