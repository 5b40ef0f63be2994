"""Settings are checked as a whole, wherever they come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from cdm_toolkit.distill.config import PRESETS, from_file, from_mapping

from cdm_toolkit.errors import BadRunConfig, UnknownName

NEEDED: dict[str, Any] = {"student": "s", "data": "d", "output": "o"}
ONE: dict[str, Any] = NEEDED | {"teachers": [{"model": "t"}]}


def test_defaults_are_without_fault() -> None:
    config = from_mapping(ONE)
    assert (config.teachers[0].method, config.data.path, config.ce_weight) == ("cdm", "d", 0.5)
    assert from_mapping(NEEDED).ce_weight == 1, "without a teacher there is nothing but cross-entropy"


def test_all_faults_are_listed_at_once() -> None:
    wrong = {
        "student": "s",
        "data": {"path": "d", "max_length": 3},
        "alpha": 1.5,
        "teachers": [
            {"model": "t", "method": "cdn", "temperature": 0, "max_edit_distance": 1.0, "top_k": 0},
            {"model": "t", "rest_bucket": "perhaps"},
        ],
        "train": {"lr": math.nan, "batch_size": 2.5, "seed": -1, "lora": {"rnk": 4}},
        "trian": {},
    }
    with pytest.raises(BadRunConfig) as caught:
        from_mapping(wrong, source="run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml has 13 faults: ")
    for part in (
        "output is missing",
        "data.max_length is 3",
        "alpha is 1.5: give a number of at most 1",
        "teachers.0.method is 'cdn': give one of cdm, em,",
        "(did you mean cdm?)",
        "teachers.0.temperature is 0: give a number above 0",
        "teachers.0.max_edit_distance is 1.0",
        "teachers.0.top_k is 0",
        "teachers.1.rest_bucket is 'perhaps': give true or false",
        "train.lr is nan",
        "train.batch_size is 2.5: give a whole number",
        "train.seed is -1",
        "train.lora.rnk is no setting, did you mean rank?",
        "trian is no setting, did you mean train?",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ({"method": "kl", "max_edit_distance": 0.2}, "kl has no use for max_edit_distance"),
        (
            {"method": "uld", "match_digits": True, "rest_bucket": False},
            "uld has no use for match_digits, rest_bucket",
        ),
        ({"method": "alm", "temperature": 2}, "alm has no use for temperature"),
        ({"mapping": "near", "positions": "mean", "cache": "c"}, "positions mean needs whole logits"),
        ({"max_edit_distance": 0.2}, "cdm with mapping spelled has no use for max_edit_distance"),
        ({"mapping": "near", "inside": False}, "cdm with mapping near has no use for inside"),
        ({"entropy": "models"}, "aligner anchored has no use for entropy models"),
    ],
)
def test_an_option_that_a_method_does_not_look_at_is_a_fault(teacher: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRunConfig, match=reason):
        from_mapping(NEEDED | {"teachers": [{"model": "t"} | teacher]})


def test_the_preset_goes_under_what_is_given() -> None:
    config = from_mapping(
        NEEDED
        | {
            "preset": "paper",
            "teachers": [{"model": "a", "temperature": 2.0}, {"model": "b", "method": "kl"}],
        }
    )
    first, second = config.teachers
    assert (config.alpha, first.temperature, first.positions, first.entropy) == (0.9, 2.0, "mean", "models")
    assert (first.rest_bucket, first.match_digits, first.exact_always) == (False, False, False)
    assert (second.temperature, second.positions) == (0.8, "boundary"), "kl takes what it has a use for"
    aligned = from_mapping(
        NEEDED | {"preset": "paper", "teachers": [{"model": "a", "aligner": "anchored"}]}
    ).teachers[0]
    assert (aligned.aligner, aligned.entropy) == ("anchored", "uniform")


def test_the_preset_is_the_papers() -> None:
    """arXiv 2502.11104, section 4.1."""
    paper = PRESETS["paper"]
    assert paper["alpha"] == 0.9
    assert (
        paper["teacher"]["temperature"],
        paper["teacher"]["top_k"],
        paper["teacher"]["max_edit_distance"],
    ) == (
        0.8,
        100,
        0.3,
    )
    with pytest.raises(UnknownName, match="paper"):
        from_mapping(ONE | {"preset": "papre"})


def test_a_run_file_with_assignments_over_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("student: s\ndata: d\noutput: o\nteachers:\n  - model: t\ntrain:\n  lr: 3e-4\n")
    config = from_file(file, ["train.lr=2e-5", "teachers.0.inside=false", "alpha=0.25"])
    assert (config.train.lr, config.teachers[0].inside, config.alpha) == (2e-5, False, 0.25)
    assert from_file(file).train.lr == 3e-4, "YAML reads 3e-4 as a text, a run file as a number"


def test_what_is_written_of_a_config_makes_it_again() -> None:
    config = from_mapping(ONE | {"preset": "paper", "train": {"lora": {"rank": 4}}})
    assert from_mapping(config.model_dump(mode="json", exclude_unset=True)) == config
