"""`cdm eval`: the table, JSON, what is kept, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest

from cdm_toolkit.hub.models import resolve_device

pytestmark = pytest.mark.filterwarnings("ignore")

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
(ADAPTER,) = re.findall(r"```python\n(from.*?class Exact.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    from cdm_toolkit.errors import SourceNotFound
    from cdm_toolkit.hub.students import new_student

    folder = tmp_path_factory.mktemp("models") / "student"
    try:
        new_student("smollm2", "200k", folder, entries=1100)
    except SourceNotFound as error:
        pytest.skip(f"no Mistral tokenizer here: {error}")
    return str(folder)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f"{n + 1}"}) + "\n" for n in range(3))
    )
    return path


@pytest.fixture
def suite(tmp_path: Path, rows: Path) -> Path:
    (tmp_path / "exact.py").write_text(ADAPTER)
    path = tmp_path / "exact.yaml"
    path.write_text(
        textwrap.dedent(
            """
            adapter: exact.py:Exact
            summary: sums
            data: {file: rows.jsonl}
            """
        )
    )
    return path


def test_the_readmes_adapter_beside_its_suite(cdm, suite: Path, student: str) -> None:
    """The example of the README: nothing else changes for a new suite."""
    answer = cdm("eval", "--suite", suite, "--model", student)
    assert answer.status == 0, answer.err
    assert "right" in answer.out
    assert sum(line.startswith("│") for line in answer.out.splitlines()) == 1
    assert "0.0000 ± 0.0000" in answer.out
    assert answer.err == f"device: {resolve_device('auto')}\n"


def test_items_are_kept_and_gone_on_from(cdm, suite: Path, student: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("eval", "--suite", suite, "--model", student, "-o", out, "--json")
    first = json.loads(cdm(*command).out)
    again = json.loads(cdm(*command).out)
    assert first["results"][0]["scores"] == again["results"][0]["scores"]
    assert (first["results"][0]["resumed"], again["results"][0]["resumed"]) == (0, 3)
    assert first["skipped"] == []
    assert first["device"] == json.loads((out / "provenance.json").read_text())["device"]
    assert first["device"] == str(resolve_device("auto"))
    (path,) = out.glob("exact/*.jsonl")
    items = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert [item["prompt"] for item in items] == ["0 + 1 =", "1 + 1 =", "2 + 1 ="]
    assert all(isinstance(item["generation"], str) for item in items)
    refused = cdm(*command, "--batch-size", "2")
    assert refused.status == 2
    assert "batch_size is not set there and 2 now" in refused.err
    assert "--overwrite" in refused.err
    assert json.loads(cdm(*command, "--batch-size", "2", "--overwrite").out)["results"][0]["resumed"] == 0
    suite.with_name("exact.py").write_text(ADAPTER + "\n# changed\n")
    changed = cdm(*command, "--batch-size", "2")
    assert changed.status == 2
    assert "suite is" in changed.err


def test_a_stopped_run_says_how_to_go_on(
    cdm, suite: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["eval", "--suite", str(suite), "--model", student, "-o", str(out)]
    monkeypatch.setattr("sys.argv", ["cdm", *command, "--overwrite"])
    broken = ADAPTER.replace("for row in map", "for n, row in enumerate(map").replace(
        ", keys):\n            (", ", keys)):\n            if n == 2: raise KeyboardInterrupt\n            ("
    )
    suite.with_name("exact.py").write_text(broken)
    answer = cdm(*command, "--overwrite")
    assert answer.status == 130
    said = answer.err.strip().splitlines()[-1]
    assert said.startswith("cdm: the evaluation was stopped, 2 items are in ")
    assert said.endswith(f"go on with: cdm {' '.join(command)}")
    assert cdm("eval", "--suite", suite, "--model", student).status == 130


def test_the_device_is_said_once(cdm, suite: Path, student: str) -> None:
    """However many models a command loads."""
    copied = shutil.copytree(student, suite.parent / "copied")
    answer = cdm("eval", "--suite", suite, "--model", student, "--model", copied, "--device", "cpu")
    assert answer.err == "device: cpu\n"


def test_the_list_has_every_suite(cdm) -> None:
    answer = cdm("eval", "list", "--json")
    assert {"bpb", "instruct", "math", "quickstart"} <= {row["suite"] for row in json.loads(answer.out)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch-size", "many"), "--batch-size is 'many'; give a number of at least 1, or auto"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--limit", "0"), "--limit is 0"),
        (("--tasks", "gsm8k"), "no --tasks: the suite 'quickstart' has no use for it"),
        (("--chat-template",), "no --chat-template: the suite 'quickstart' has no use for it"),
        (("--fewshot-data", "x.jsonl"), "no --fewshot-data"),
    ],
)
def test_options_without_sense_are_refused(cdm, arguments: tuple[str, ...], said: str) -> None:
    answer = cdm("eval", "--suite", "quickstart", "--model", "nowhere", *arguments)
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_an_output_that_cannot_be_written(cdm, student: str, rows: Path) -> None:
    answer = cdm("eval", "--suite", "bpb", "--data", rows, "--model", student, "-o", "/proc/no/such")
    assert answer.status == 2
    assert "cannot be written" in answer.err


def test_a_model_that_does_not_fit(cdm, student: str, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cdm_toolkit.evaluation import memory

    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**10)
    answer = cdm("eval", "--suite", "bpb", "--data", rows, "--model", student, "--device", "cpu")
    assert answer.status == 2
    assert "of memory in float32, 0.0 GiB are available on cpu" in answer.err
