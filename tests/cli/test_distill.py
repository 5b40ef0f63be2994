"""`cdm distill` and `cdm recipes`: run files, plans, runs that are killed, runs of two processes."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
import yaml

from cdm_toolkit.cli.distill import distill
from cdm_toolkit.distill.recipes import list_recipes
from cdm_toolkit.distill.settings import from_file
from cdm_toolkit.hub.models import resolve_device

if TYPE_CHECKING:
    from preloaded import Started

RUN: dict[str, Any] = {
    "alpha": 0.5,
    "train": {"batch_size": 4, "lr": 3e-3, "log_every": 1, "save_every": 2, "max_steps": 6},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Make a tiny teacher and student with tokenizers of two kinds, and rows."""
    from cdm_toolkit.hub.tiny_models import new_tiny_pair

    root = tmp_path_factory.mktemp("models")
    rows = [
        {
            "prompt": f"What is {a} + {a + 3}?",
            "completion": f"{a} + {a + 3} = {2 * a + 3}. It is {2 * a + 3}.",
        }
        for a in range(24)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = new_tiny_pair([f"{row['prompt']} {row['completion']}" for row in rows], root)
    return RUN | {
        "student": pair.student,
        "data": {"path": str(root / "rows.jsonl")},
        "teachers": [{"model": pair.teacher, "top_k": 10}],
    }


@pytest.fixture
def run_file(models: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(models | {"output": str(tmp_path / "out")}))
    return file


def test_the_help_has_the_defaults_of_a_run() -> None:
    from cdm_toolkit.distill.settings import DataConfig, DistillConfig
    from cdm_toolkit.distill.teacher_settings import TeacherConfig

    config = DistillConfig(
        student="-", data=DataConfig(path="-"), output="-", teachers=(TeacherConfig(model="-"),)
    )
    (teacher,) = config.teachers
    places = (config, config.data, config.train, teacher)
    hints = get_type_hints(distill, include_extras=True)
    shown = {
        name: option.show_default
        for name, hint in hints.items()
        for option in getattr(hint, "__metadata__", ())
        if isinstance(getattr(option, "show_default", None), str)
    }
    assert {"lr", "alpha", "method", "epochs", "batch_size", "max_length", "template", "seed"} <= shown.keys()
    for name, default in shown.items():
        values = [getattr(place, name) for place in places if hasattr(place, name)]
        assert default == str(values[0]), name


def test_a_run_file_with_options_and_assignments_over_it(cdm, run_file: Path, tmp_path: Path) -> None:
    answer = cdm("distill", run_file, "--max-steps", 2, "--set", "teachers.0.top_k=20", "--json")
    assert answer.status == 0, answer.err
    said = json.loads(answer.out)
    assert said["steps"] == 2
    assert answer.err.count(f"device: {resolve_device('auto')}\n") == 1
    assert said["losses"][0]["teachers"][0]["pairs"] <= 20
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["config"]["train"]["max_steps"] == 2
    again = cdm("distill", run_file, "--max-steps", 2, "--method", "sft", "--overwrite")
    assert again.status == 0, again.err
    assert "KD" not in again.out


def test_a_plan_trains_nothing(cdm, run_file: Path, tmp_path: Path) -> None:
    answer = cdm("distill", run_file, "--dry-run")
    assert answer.status == 0, answer.err
    for word in ("6 of 4 rows", "24 read, 24 trained", "matched mass", "of the labels aligned", "GiB"):
        assert word in answer.out
    assert not (tmp_path / "out").exists()
    plan = json.loads(cdm("distill", run_file, "--dry-run", "--json").out)
    assert 0 < plan["teachers"][0]["matched_mass"] < 0.1, "an untrained teacher's top k have little of it"
    assert "has a match in the student's vocabulary" in answer.err
    assert plan["config"]["alpha"] == 0.5


def test_faults_of_a_run_file_are_one_line(cdm, run_file: Path) -> None:
    content = yaml.safe_load(run_file.read_text())
    content["trian"] = content.pop("train")
    content["teachers"][0] |= {"method": "kl", "max_edit_distance": 0.2}
    run_file.write_text(yaml.safe_dump(content))
    answer = cdm("distill", run_file, "--alpha", 7)
    assert (answer.status, answer.out) == (2, "")
    (line,) = answer.err.strip().splitlines()
    assert line.startswith(f"cdm: error: {run_file} has 3 faults: ")
    for word in ("did you mean train?", "max_edit_distance is of no use to kl", "alpha is 7"):
        assert word in line
    assert cdm("distill", "small/cmd").err.strip().endswith("small/transplant, small/two-teachers")
    assert "there is no such file" in cdm("distill", "none.yaml").err
    assert "KEY=VALUE" in cdm("distill", run_file, "--set", "alpha").err


def test_recipes_are_listed_shown_and_copied(cdm, tmp_path: Path) -> None:
    listed = json.loads(cdm("recipes", "list", "--json").out)
    names = [recipe["name"] for recipe in listed]
    assert {
        f"paper/{pair}-{task}"
        for pair in ("phi3-qwen2", "llama3-gemma2", "qwen2-opt")
        for task in ("instruct", "code", "math")
    } <= set(names)
    shown = cdm("recipes", "show", "small/spelling").out
    assert yaml.safe_load(shown)["teachers"] == [{"model": "smollm2"}]
    copied = cdm("recipes", "copy", "small/spelling", tmp_path / "mine.yaml")
    assert "cdm distill" in copied.out
    assert (tmp_path / "mine.yaml").read_text() == shown
    assert "--overwrite" in cdm("recipes", "copy", "small/spelling", tmp_path / "mine.yaml").err
    assert "did you mean small/cdm?" in cdm("recipes", "show", "small/cmd").err


def test_a_file_for_accelerate_is_copied_and_is_no_run(
    cdm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copied = cdm("recipes", "copy", "accelerate/fsdp2")
    line = "accelerate launch --config_file fsdp2.yaml -m cdm_toolkit.cli distill run.yaml"
    assert line in copied.out.replace("\n", " ")
    assert line in (tmp_path / "fsdp2.yaml").read_text()
    assert "unknown recipe" in cdm("distill", "accelerate/fsdp2").err


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in list_recipes() if recipe.is_run], ids=lambda recipe: recipe.name
)
def test_each_recipe_is_without_fault(recipe) -> None:
    config = from_file(recipe.path)
    assert recipe.summary
    if recipe.name.startswith("paper/") and recipe.name != "paper/two-teachers":
        assert config.teachers[0].aligner == "entropy-dtw"


def finished(process: Started) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


def launched(*words: str) -> tuple[list[str], dict[str, str]]:
    """Give the command and the environment that `accelerate launch` starts on a CPU."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(
        _validate_launch_command(launch_command_parser().parse_args(words))[0]
    )
    return command, environment


def lines(answer: str) -> list[tuple[float, ...]]:
    return [
        (log["step"], log["loss"], log["ce"], log["teachers"][0]["kd"], log["grad_norm"])
        for log in json.loads(answer)["losses"]
    ]


def evaluations(answer: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(answer)["evaluations"]
    return [{name: value for name, value in log.items() if name != "seconds"} for log in found]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Write five rows that are none of the data."""
    rows = [{"prompt": f"What is {a} - 3?", "completion": f"{a} - 3 = {a - 3}."} for a in range(30, 35)]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_held_out_rows_on_the_screen(cdm, run_file: Path, held_out: Path) -> None:
    run = ("distill", run_file, "--eval", held_out, "--max-steps", 3)
    answer = cdm(*run, "--set", "eval.every=2")
    assert answer.status == 0, answer.err
    assert answer.err.count("held-out rows:") == 2
    assert "the best so far" in answer.err
    assert "of step 3, the best on held-out rows" in answer.out
    assert "held-out bits per byte" in answer.out
    assert "2, of 5 held-out rows" in cdm(*run, "--set", "eval.every=2", "--dry-run").out
    content = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump(content | {"eval": str(held_out)}))
    assert "1, of 5 held-out rows" in cdm("distill", run_file, "--set", "eval.every=6", "--dry-run").out


def test_faults_of_held_out_rows_are_one_line(cdm, run_file: Path, models: dict[str, Any]) -> None:
    def said(*options: str) -> str:
        answer = cdm("distill", run_file, *options)
        assert (answer.status, answer.out) == (2, "")
        (line,) = answer.err.strip().splitlines()
        return str(line)

    data = models["data"]["path"]
    assert said("--eval", data).startswith(
        f"cdm: error: {data}, row 1: it is trained on, as row 1 of {data}, and so are 23 more; take them out of one"
    )
    assert "eval: path is missing, or sources, or a share of the data" in said("--set", "eval.patience=3")
    assert "eval.share is 2: give a number below 1" in said("--set", "eval.share=2")
    plain = cdm(
        "distill", "--student", "s", "--teacher", "t", "--data", "d", "-o", "o", "--set", "eval.every=0"
    )
    assert "eval.every is 0: give a number of at least 1" in plain.err


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    start_cdm, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in mid-run, twice: the losses, the evaluations and the weights of an unbroken run."""
    content = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump(content | {"eval": {"share": 0.2, "every": 3}}))
    monkeypatch.chdir(tmp_path)
    whole, _ = finished(start_cdm("distill", run_file, "-o", "whole", "--json"))
    command = ("distill", run_file, "--json")
    for checkpoint in (2, 4):
        process = start_cdm(*command, *(["--resume"] if checkpoint > 2 else []))
        while not (tmp_path / "out" / f"checkpoint-{checkpoint}" / "checksums.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "out" / "config.json").exists()
    resumed, _ = finished(start_cdm(*command, "--resume"))
    assert lines(resumed) == lines(whole)
    assert evaluations(resumed) == evaluations(whole)
    assert [log["step"] for log in evaluations(whole)] == [3, 6]
    assert json.loads(resumed)["best"]["step"] == json.loads(whole)["best"]["step"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(
    start_cdm, run_file: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a CPU accelerate starts one process a launch, and gloo joins them. Each evaluates two of three batches."""
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump(content | {"eval": {"path": str(held_out), "every": 3}}))
    alone, _ = finished(start_cdm("distill", run_file, "-o", "alone", "--json"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port)
    run = ("distill", run_file, "--batch-size", "2", "--json")
    (_, module, *words), told = launched(
        *(
            "--cpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            *plain,
            "-m",
            "cdm_toolkit.cli",
            *map(str, run),
        )
    )
    assert [module, *words] == ["-m", "cdm_toolkit.cli", *map(str, run)]
    both = [start_cdm(*run, **told, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2") for rank in "01"]
    (first, _), (second, _) = map(finished, both)
    assert second == "", "the first process tells"
    for one, two in zip(lines(alone), lines(first), strict=True):
        assert two[:4] == pytest.approx(one[:4], abs=1e-5)
        assert two[4] == pytest.approx(one[4], abs=1e-4)
    assert len(evaluations(first)) == 2
    for apart, together in zip(evaluations(alone), evaluations(first), strict=True):
        for name in ("step", "loss", "ce", "bits_per_byte"):
            assert together[name] == pytest.approx(apart[name], abs=1e-4)
        kd = [log["teachers"][0]["kd"] for log in (apart, together)]
        assert kd[0] == pytest.approx(kd[1], abs=1e-4)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(start_cdm, run_file: Path, tmp_path: Path) -> None:
    process = start_cdm("distill", run_file, "--max-steps", 500)
    while not (tmp_path / "out" / "checkpoint-2" / "checksums.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("cdm: the run was stopped, step ")
    assert last.endswith(f"go on with: cdm distill {run_file} --max-steps 500 --resume")
