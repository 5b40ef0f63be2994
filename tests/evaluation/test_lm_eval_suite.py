"""Tasks of lm-eval by name: choices, tasks of one's own, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cdm_toolkit.errors import BadOption, FileProblem, NoData
from cdm_toolkit.evaluation.evaluate import Ask, Subject, open_suite
from cdm_toolkit.evaluation.item_store import open_items

lm_eval_evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed")
MakeSubject = Callable[..., Subject]
TASK = "colours"


@pytest.fixture(autouse=True, scope="module")
def _a_few_tasks_of_lm_eval_are_indexed() -> Iterator[None]:
    """Read those of two folders once: all its thousands of files take ten seconds."""
    from lm_eval.tasks._index import TaskIndex

    build, own = TaskIndex.build, Path(lm_eval_evaluator.__file__).parent / "tasks"
    index_of_own = cache(lambda: build([own / name for name in ("arc", "hellaswag")]))

    def with_own(paths: Sequence[Path]) -> dict[str, Any]:
        return index_of_own() | build(paths[1:]) if paths[:1] == [own] else build(paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(with_own))
        yield


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Write a multiple-choice task on a local file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"thing": thing, "options": ["red", "green", "blue"], "right": n % 3}
        for n, thing in enumerate(("a rose", "grass", "the sky", "blood", "a leaf", "the sea"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(tmp_path / "c"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "The colour of {{thing}} is",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "colours.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_a_task_of_ones_own_is_scored_as_lm_eval_does(
    make: MakeSubject, task_folder: Path, tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager

    from cdm_toolkit.evaluation.lm_eval_suite import wrap_model

    tiny = make()
    suite = open_suite("math", Ask(tasks=(TASK,), include_path=task_folder))
    assert suite.contents.keys == tuple(f"{TASK}/{n}" for n in range(6))
    with open_items(tmp_path / "items.jsonl", {}) as file:
        for item in suite.score(tiny, suite.contents.keys):
            file.keep(item)
    with open_items(tmp_path / "items.jsonl", {}) as file:  # as they come back from the disk
        summary = suite.summarize([file.items[key] for key in suite.contents.keys])
    loaded = TaskManager(include_path=str(task_folder), include_defaults=False).load([TASK])
    lm = wrap_model(tiny)
    expected = lm_eval_evaluator.evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0)["results"][TASK]
    assert {score.metric: score.value for score in summary.scores} == {
        "acc": expected["acc,none"],
        "acc_norm": expected["acc_norm,none"],
    }
    assert all(score.stderr and score.n == 6 for score in summary.scores)


@pytest.mark.slow
def test_a_task_that_is_out_of_reach_is_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        NoData, match=r"no data for the suite 'math', tried the tasks arc_easy: .*`include_path`"
    ):
        open_suite("math", Ask(tasks=("arc_easy",)))


def test_what_makes_no_sense_is_refused(task_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    for ask, said in (
        (Ask(tasks=(TASK,), include_path=task_folder, data=rows), "no `data`: colours has data of its own"),
        (Ask(tasks=(TASK,), include_path=task_folder, fewshot_data=rows), "no `fewshot_data`"),
        (Ask(data=rows, include_path=task_folder), "no `include_path`"),
    ):
        with pytest.raises(BadOption, match=said):
            open_suite("math", ask)
    with pytest.raises(FileProblem, match="there is no such folder"):
        open_suite("math", Ask(tasks=(TASK,), include_path=tmp_path / "none"))


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        BadOption, match="`tasks` is 'arc_eazy'; give a task that lm-eval has, such as arc_easy"
    ):
        open_suite("math", Ask(tasks=("arc_eazy",)))


@pytest.mark.slow
def test_a_group_comes_before_its_tasks(make: MakeSubject, task_folder: Path) -> None:
    first = (task_folder / "colours.yaml").read_text()
    (task_folder / "more.yaml").write_text(first.replace("task: colours", "task: more_colours"))
    group = {
        "group": "painting",
        "task": [TASK, "more_colours"],
        "aggregate_metric_list": [{"metric": "acc"}],
    }
    (task_folder / "group.yaml").write_text(yaml.safe_dump(group))
    suite = open_suite("math", Ask(tasks=("painting",), include_path=task_folder, limit=4))
    assert suite.contents.keys[3:5] == ("colours/3", "more_colours/0")
    items = {item.key: item for item in suite.score(make(), suite.contents.keys)}
    scores = suite.summarize([items[key] for key in suite.contents.keys]).scores
    assert [(score.metric, score.n) for score in scores if "norm" not in score.metric] == [
        ("painting: acc", 8),
        ("colours: acc", 4),
        ("more_colours: acc", 4),
    ]
