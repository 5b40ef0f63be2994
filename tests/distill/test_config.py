"""Settings are checked as a whole."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cdm_toolkit.distill.config import DistillConfig, from_mapping, paper
from cdm_toolkit.errors import BadRunConfig

NEEDED = {"teacher": "t", "student": "s", "data": "d", "output": "o"}


def test_defaults_are_without_fault() -> None:
    DistillConfig(**NEEDED)
    DistillConfig(**NEEDED | {"teacher": None, "method": "sft"})


def test_all_faults_are_listed_at_once() -> None:
    wrong = {
        "method": "cdn",
        "alpha": 1.5,
        "temperature": 0.0,
        "theta": 1.0,
        "top_k": 0,
        "learning_rate": math.nan,
        "batch_size": 2.5,
        "rest_bucket": "yes",
        "seed": True,
        "overwrite": True,
        "resume": True,
    }
    with pytest.raises(BadRunConfig) as caught:
        DistillConfig(**NEEDED | wrong)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "did you mean cdm?" in message
    assert "overwrite and resume" in message
    assert all(f"{name} is" in message for name in wrong if name not in ("overwrite", "resume"))
    assert "10 faults" in message


@pytest.mark.parametrize(
    "setting",
    [
        {"alpha": -0.1},
        {"temperature": math.inf},
        {"theta": 0.0},
        {"max_steps": 0},
        {"max_length": 3},
        {"aligner": "dwt"},
        {"positions": "first"},
        {"device": "tpu"},
        {"dtype": "float16"},
        {"schedule": "step"},
        {"student": ""},
        {"teacher": None},
        {"warmup_steps": -1},
        {"grad_accumulation": 0},
    ],
)
def test_each_is_a_fault(setting: dict[str, Any]) -> None:
    with pytest.raises(BadRunConfig, match="a fault: " + next(iter(setting))):
        DistillConfig(**NEEDED | setting)


def test_unknown_and_missing_names() -> None:
    with pytest.raises(BadRunConfig) as caught:
        from_mapping({"student": "s", "data": "d", "learning_rte": 1.0}, source="run.yaml")
    assert "run.yaml has 2 faults" in str(caught.value)
    assert "did you mean learning_rate?" in str(caught.value)
    assert "output is missing" in str(caught.value)


def test_paper_preset_can_be_changed() -> None:
    config = paper(**NEEDED, alpha=0.5)
    assert (config.alpha, config.temperature, config.positions, config.rest_bucket) == (
        0.5,
        0.8,
        "mean",
        False,
    )
