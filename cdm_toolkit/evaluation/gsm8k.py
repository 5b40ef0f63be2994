"""lm-eval's GSM8K tasks on rows from our own file; prompt, filters and metric are lm-eval's.

For `gsm8k`, lm-eval draws few-shot examples for each question from a training split: the file that the caller gives,
else the training split of the hub's data set, else the word problems in `cdm_toolkit.samples`. The source is part of
the result. `gsm8k_cot` has fixed examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.errors import BadRow, FileProblem
from cdm_toolkit.evaluation.evaluate import Ask
from cdm_toolkit.evaluation.suite_data import find_data
from cdm_toolkit.evaluation.suites import DataSource, SuiteSpec
from cdm_toolkit.kd.rows import Row

TASK_FILES: Mapping[str, str] = {
    "gsm8k": "gsm8k.yaml",
    "gsm8k_cot": "gsm8k-cot.yaml",
    "gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot.yaml",
}
"""The tasks that use our rows, with the name of lm-eval's file."""
DRAWS_EXAMPLES = "gsm8k"
"""The task that draws examples from rows; the others have fixed examples or none."""
FIELDS = "question and answer"
ANSWER = re.compile(r"#### -?[0-9.,]+\s*$")


@dataclass(frozen=True, slots=True)
class Problems:
    """The questions to score, the few-shot examples, and the sources of both."""

    rows: tuple[Row, ...]
    shots: tuple[Row, ...]
    data: str
    shots_source: str


def find_problems(spec: SuiteSpec, ask: Ask) -> Problems:
    """Read a suite's questions and few-shot examples; scored questions are removed from the examples.

    Raises NoData, FileProblem and BadRow.
    """
    data = find_data(spec, ask.data, FIELDS)
    rows = read_problems(data.path)[: ask.limit]
    source, split = DataSource(sample="train"), spec.settings.fewshot_split
    if ask.data is None and spec.data.hub is not None and split is not None:
        source = spec.data.model_copy(update={"split": split})
    shots = find_data(replace(spec, data=source), ask.fewshot_data, FIELDS)
    scored = {row.prompt for row in rows}  # lm-eval excludes only examples from the test split
    examples = tuple(row for row in read_problems(shots.path) if row.prompt not in scored)
    return Problems(tuple(rows), examples, data.source, shots.source)


def write_task(
    folder: Path, name: str, problems: Problems, *, fewshot: int | None, max_new_tokens: int
) -> Path:
    """Write a task file that includes lm-eval's own, with its data.

    `lm_eval --tasks gsm8k --include_path FOLDER` runs the same task from the command line. Raises FileProblem if there
    are fewer examples than a prompt needs, or none.
    """
    import lm_eval.tasks

    included = Path(str(lm_eval.tasks.__file__)).parent / "gsm8k" / TASK_FILES[name]
    theirs = yaml.safe_load(included.read_text(encoding="utf-8"))
    if name == DRAWS_EXAMPLES:
        _check_shots(problems, theirs["num_fewshot"] if fewshot is None else fewshot)
    files = {"test": folder / "test.jsonl", "train": folder / "train.jsonl"}
    for path, rows in zip(files.values(), (problems.rows, problems.shots), strict=True):
        path.write_text("".join(map(_as_gsm8k, rows)), encoding="utf-8")
    task: dict[str, Any] = {
        "include": str(included),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items()},
            "cache_dir": str(folder / "cache"),
        },
        # those of the including file replace the included ones
        "generation_kwargs": theirs["generation_kwargs"] | {"max_gen_toks": max_new_tokens},
    } | ({"num_fewshot": fewshot} if fewshot is not None else {})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def _check_shots(problems: Problems, count: int) -> None:
    if len(problems.shots) < max(count, 1):
        raise FileProblem(
            problems.shots_source,
            f"it has {len(problems.shots)} rows besides the scored ones, the suite needs {count} examples",
            "give another `fewshot_data`",
        )


def read_problems(path: Path) -> list[Row]:
    """Read questions with answers that end with `#### N`. Raises FileProblem and BadRow."""
    rows = read_rows(path)
    for row in rows:
        if not row.prompt:
            raise BadRow(path, row.number, "it has no question", f"give each row {FIELDS}")
        if not ANSWER.search(row.completion):
            raise BadRow(
                path, row.number, "its answer does not end with #### and a number", "end it with #### 42"
            )
    return rows


def _as_gsm8k(row: Row) -> str:
    return json.dumps({"question": row.prompt, "answer": row.completion}) + "\n"
