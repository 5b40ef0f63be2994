"""What README.md, docs/kd.md and the method of docs/how-to show of `kd` runs, and gives what `cdm distill` gives."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from cdm_toolkit.cli import main
from cdm_toolkit.distill.run import run
from cdm_toolkit.distill.sampler import epoch_order
from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.samples import sample_path

if TYPE_CHECKING:
    from preloaded import Started

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "kd.md"
METHOD_PAGE = ROOT / "docs" / "how-to" / "add-a-method.md"


def blocks(page: Path, heading: str) -> list[str]:
    """Take the Python blocks of a page's section."""
    section = page.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture
def workplace(small_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder that has small models under the names that the pages use, and rows."""
    for name, model in (
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "teacher"),
        ("Qwen/Qwen2.5-0.5B", "student"),
        ("student", "student"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(small_models / model)
    lines = sample_path("train").read_text(encoding="utf-8").splitlines()[:44]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDM_CACHE", str(small_models / "cache"))
    return tmp_path


def rows_in_order(seed: int) -> list[dict[str, Any]]:
    """Read the rows in the order in which a run of `cdm distill` takes them."""
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text(encoding="utf-8").splitlines()]
    order = epoch_order(
        np.ones(len(rows), np.int64), rows_per_step=8, seed=seed, epoch=0, group_by_length=False
    )
    return [rows[nth] for nth in order]


def test_the_training_loop_has_the_losses_of_a_run(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks(README, "In your own training loop")
    assert len([line for line in block.splitlines() if line]) <= 15
    config = from_mapping(
        {
            "student": "Qwen/Qwen2.5-0.5B",
            "data": {"path": "rows.jsonl"},
            "output": "out",
            "teachers": [{"model": "HuggingFaceTB/SmolLM2-1.7B-Instruct"}],
            "train": {
                "schedule": "constant",
                "batch_size": 8,
                "group_by_length": False,
                "max_grad_norm": 1e9,
                "seed": 3,
                "device": "cpu",
                "log_every": 1,
                "save_every": 0,
            },
        }
    )
    logged = [(log.ce, log.teachers[0].kd) for log in run(config).losses]
    capsys.readouterr()
    exec(block, {"rows": rows_in_order(seed=3)})
    printed = [tuple(map(float, line.split())) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == len(logged) == 6
    assert np.array(printed) == pytest.approx(np.array(logged), abs=1e-6, rel=0)
    assert len(set(printed)) == 6


@pytest.fixture
def page(workplace: Path) -> dict[str, Any]:
    """Run all blocks of the page but the method, one after the other, and give their names."""
    (workplace / "Qwen/Qwen2.5-7B-Instruct").symlink_to((workplace / "student").resolve())
    teacher = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    assert main(["teacher", "cache", "--model", teacher, "--data", "rows.jsonl", "-o", "cache"]) == 0
    names: dict[str, Any] = {"rows": rows_in_order(seed=0)}
    for block in blocks(PAGE, "Use the losses in your own trainer"):
        exec(block, names)
    return names


def test_the_blocks_of_the_page_run(page: dict[str, Any]) -> None:
    assert page["aligned"].alignment.groups.shape[1] == 4
    assert page["out"].loss.isfinite()
    # the method has the signal of the cache that it has of the model, within float16
    stored, computed = page["signal"], page["loss"].signal(page["teacher"], page["batch"])
    assert np.allclose(stored.top.logprobs, computed.top.logprobs, atol=0.01)


def test_accumulated_gradients_are_those_of_one_batch(page: dict[str, Any]) -> None:
    accumulate = next(code for code in blocks(PAGE, "Use the losses in your own trainer") if ".sums" in code)
    loss, student, teacher = page["loss"], page["student"], page["teacher"]
    student.zero_grad()
    exec(accumulate, page)
    weights = student.get_input_embeddings().weight
    accumulated = weights.grad.clone()
    student.zero_grad()
    batch = page["pair"].collate(page["rows"][:8])
    out = loss(student(**batch.student).logits, loss.signal(teacher, batch), batch)
    (0.8 * out.ce + 0.2 * out.kd).backward()
    assert np.allclose(weights.grad, accumulated, atol=1e-6)


# A method in one file


@pytest.fixture
def cdm(
    workplace: Path, start_cdm: Callable[..., Started]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Give the function that runs `cdm` in a process that knows the method of the page."""
    (code,) = blocks(METHOD_PAGE, "The file")
    assert len(code.splitlines()) <= 40
    (workplace / "top_token.py").write_text(code, encoding="utf-8")

    def run_cdm(*words: str) -> subprocess.CompletedProcess[str]:
        process = start_cdm(*words, CDM_METHODS="top_token.py", COLUMNS="300", PYTHONPATH=str(ROOT))
        out, err = process.communicate()
        return subprocess.CompletedProcess(words, process.wait(), out, err)

    return run_cdm


RUN = ("--teacher", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "--student", "student", "--data", "rows.jsonl")


def test_the_method_is_in_the_help(cdm: Callable[..., Any]) -> None:
    help_text = " ".join(cdm("distill", "--help").stdout.replace("│", " ").split())
    assert "top-token: cross-entropy against the teacher's most likely token" in help_text


def test_the_nearest_name_is_the_method(cdm: Callable[..., Any]) -> None:
    answer = cdm("distill", "--method", "top-tokn", *RUN, "--output", "out")
    assert answer.returncode == 2
    assert "did you mean top-token?" in answer.stderr


def test_the_settings_of_the_method_are_checked(cdm: Callable[..., Any]) -> None:
    answer = cdm(
        "distill",
        "--method",
        "top-token",
        *RUN,
        "--output",
        "out",
        "--set",
        "teachers.0.min_probabilty=0.5",
    )
    assert answer.returncode == 2
    assert "did you mean min_probability?" in answer.stderr


@pytest.mark.slow
def test_the_method_trains(cdm: Callable[..., Any]) -> None:
    answer = cdm(
        "distill",
        "--method",
        "top-token",
        *RUN,
        "--output",
        "out",
        "--json",
        "--lr",
        "1e-2",
        "--set",
        "train.log_every=1",
    )
    assert answer.returncode == 0, answer.stderr
    losses = json.loads(answer.stdout)["losses"]
    assert losses[-1]["teachers"][0]["kd"] < losses[0]["teachers"][0]["kd"]


@pytest.mark.slow
def test_the_method_is_compared(cdm: Callable[..., Any], workplace: Path) -> None:
    study = {
        "teacher": RUN[1],
        "student": "student",
        "train": {"sums": {"path": "sample:train", "rows": 6}},
        "inside": {"sums": {"path": "sample:heldout", "rows": 3}},
        "max_length": 400,
        "steps": 2,
        "run": {"batch_size": 2},
        "default": "top-token",
        "methods": {"top-token": {"method": "top-token", "min_probability": 0.2}},
    }
    (workplace / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    answer = cdm("compare", "study.yaml", "-o", "compared")
    assert answer.returncode == 0, answer.stderr
    (cell,) = (workplace / "compared" / "cells").glob("*/cell.json")
    assert json.loads(cell.read_text(encoding="utf-8"))["result"]["cell"]["method"] == "top-token"
    assert "top-token" in (workplace / "compared" / "report.html").read_text(encoding="utf-8")
