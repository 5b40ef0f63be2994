"""`cdm doctor`, and `--train`: real runs on the CPU, and what a device that fails leaves in the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cdm_toolkit.distill import device_check
from cdm_toolkit.distill.device_check import TOLERANCE, Trial
from cdm_toolkit.hub.tiny_models import new_tiny_pair
from cdm_toolkit.kd.spelling import Spelling


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("CDM_CACHE", str(tmp_path_factory.getbasetemp() / "doctor-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_what_this_machine_has(cdm) -> None:
    said = json.loads(cdm("doctor", "--json").out)
    assert {"torch_build", "cuda", "driver", "cpu", "packages", "cache"} <= said.keys()
    assert said["cpu"] in " ".join(cdm("doctor").out.replace("│", " ").split())


@pytest.mark.slow
def test_training_on_the_cpu(cdm) -> None:
    answer = cdm("doctor", "--train", "--devices", "cpu")
    assert answer.status == 0, answer.out + answer.err
    assert "\x1b" not in answer.out, "no colour in what is pasted"
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in answer.out.splitlines()
        if line.startswith("| cpu")
    ]
    assert [row[:3] for row in rows] == [
        ["cpu", "float32", "sdpa"],
        ["cpu", "bfloat16", "sdpa"],
        ["cpu", "float32", "eager"],
    ]
    assert [row[-1].split(" ")[0] for row in rows] == ["the", "agrees", "agrees"]
    for _, _, _, losses, speed, *_ in rows:
        first, _, last = map(float, losses.split())
        assert last < first
        assert float(speed.replace(",", "")) > 0
    for word in ("cdm-toolkit ", "transformers ", "DTW by numba: as the reference", "all trials agree"):
        assert word in answer.out


def test_training_as_json(cdm) -> None:
    said = json.loads(cdm("doctor", "--train", "--devices", "cpu", "--json").out)
    assert said["well"]
    assert said["dtw_problem"] is None
    reference, *others = said["trials"]
    assert reference["difference"] == 0
    for trial in others:
        assert trial["difference"] <= TOLERANCE[trial["dtype"]]
        assert len(trial["losses"]) == device_check.STEPS
    assert {trial["dtype"] for trial in others} == {"float32", "bfloat16"}
    kd = [log["teachers"][0]["kd"] for log in reference["losses"]]
    assert min(kd) > 0, "the teacher teaches"


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_here(cdm, device: str) -> None:
    answer = cdm("doctor", "--train", "--devices", f"cpu,{device}")
    assert (answer.status, answer.out) == (2, "")
    (line,) = answer.err.strip().splitlines()
    assert line.startswith(f"cdm: error: device is '{device}'; give cpu")


def test_devices_without_training(cdm) -> None:
    answer = cdm("doctor", "--devices", "cpu")
    assert answer.status == 2
    assert "--devices is for training; give --train as well" in answer.err


def _spoilt(monkeypatch: pytest.MonkeyPatch, factor: float, *, only: str) -> None:
    """Multiply KD by a factor in trials of one dtype."""
    loss, run_trial, running = Spelling.loss, device_check.run_trial, [""]

    def noted(trial: Trial, *arguments: Any) -> Trial:
        running[0] = trial.dtype
        return run_trial(trial, *arguments)

    def spoilt(self: Spelling, *arguments: Any, **more: Any) -> Any:
        right = loss(self, *arguments, **more)
        return right if running[0] != only else replace(right, kd=factor * right.kd)

    monkeypatch.setattr(device_check, "run_trial", noted)
    monkeypatch.setattr(Spelling, "loss", spoilt)


def test_a_loss_that_is_not_finite(cdm, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoilt(monkeypatch, math.nan, only="bfloat16")
    answer = cdm("doctor", "--train", "--devices", "cpu")
    assert answer.status == 1, answer.err
    assert "Traceback" not in answer.out + answer.err
    (failed,) = [line for line in answer.out.splitlines() if "failed:" in line]
    assert "bfloat16" in failed
    assert "is not finite at step 1" in failed
    assert "1 of 3 trials failed or differ" in answer.out


def test_a_reference_that_fails_leaves_nothing_to_compare_with(cdm, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoilt(monkeypatch, math.inf, only="float32")
    answer = cdm("doctor", "--train", "--devices", "cpu")
    assert answer.status == 1, answer.err
    assert answer.out.count("is not finite") == 2
    assert answer.out.count("nothing to compare with") == 1


def test_losses_that_differ(cdm, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoilt(monkeypatch, 1.2, only="bfloat16")
    answer = cdm("doctor", "--train", "--devices", "cpu")
    assert answer.status == 1, answer.err
    assert "differs by 2e-01, more than 5e-02" in answer.out


@pytest.mark.slow
def test_a_trial_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = new_tiny_pair(["a small text for small vocabularies"], tmp_path)
    trial = Trial("cpu", "float32")
    here = device_check.run_trial(trial, pair, str(tmp_path))
    there = device_check._run_alone(trial, pair, str(tmp_path))
    assert here.problem is there.problem is None
    assert [log.loss for log in there.losses] == pytest.approx([log.loss for log in here.losses], rel=1e-5)
    crashing = tmp_path / "crashing.py"
    crashing.write_text("import os, multiprocessing\nif multiprocessing.parent_process(): os.abort()\n")
    monkeypatch.setenv("CDM_METHODS", str(crashing))
    assert device_check._run_alone(trial, pair, str(tmp_path)).problem == "its process crashed or was killed"


def test_a_process_sees_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_check._visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a,7")
    assert device_check._visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "GPU-8a"}
    assert device_check._visible("mps") == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu(cdm) -> None:
    answer = cdm("doctor", "--train", "--devices", "cuda:0")
    assert answer.status == 0, answer.out + answer.err
    assert "| cuda:0 | bfloat16 | sdpa" in answer.out
