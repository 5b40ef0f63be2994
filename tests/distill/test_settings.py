"""Settings are checked as a whole, wherever they come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cdm_toolkit.distill.settings import PRESETS, from_file, from_mapping
from cdm_toolkit.errors import BadSettings, UnknownName

NEEDED: dict[str, Any] = {"student": "s", "data": "d", "output": "o"}
ONE: dict[str, Any] = NEEDED | {"teachers": [{"model": "t"}]}


def test_defaults_are_without_fault() -> None:
    config = from_mapping(ONE)
    assert (config.teachers[0].method, config.data.name, config.ce_weight) == ("spelling", "d", 0.8)
    assert from_mapping(NEEDED).ce_weight == 1, "without a teacher there is nothing but cross-entropy"


def test_data_is_a_path_or_settings_or_a_list() -> None:
    paths = {"d": [("d", 1)], "e": [("d", 1), ("e", 2)]}
    for data in ("d", {"path": "d"}, ["d"], {"sources": [{"path": "d"}]}):
        assert [
            (each.path, each.weight) for each in from_mapping(NEEDED | {"data": data}).data.all_sources
        ] == paths["d"]
    several = from_mapping(NEEDED | {"data": ["d", {"path": "e", "weight": 2}]}).data
    assert [(each.path, each.weight) for each in several.all_sources] == paths["e"]
    assert several.name == "d, e"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": "d", "wieght": 2}, "data.wieght is no setting, did you mean weight?"),
        ({"max_length": 30}, "data: path is missing, or sources"),
        ([], "data: path is missing, or sources"),
        ({"path": "d", "sources": ["e"]}, "data.sources.0 is 'e': give a mapping"),
        (
            {"path": "d", "alpha": 1, "sources": [{"path": "e"}]},
            "data: alpha, path beside sources: put it into each",
        ),
        ({"path": "d", "weight": 0}, "data.weight is 0: give a number above 0"),
        ([{"path": "d", "alpha": 2}], "data.sources.0.alpha is 2: give a number of at most 1"),
        ([{}], "data.sources.0.path is missing"),
    ],
)
def test_faults_of_data(data: Any, said: str) -> None:
    with pytest.raises(BadSettings) as caught:
        from_mapping(NEEDED | {"data": data})
    assert f"has a fault: {said}" in str(caught.value)


def test_one_tracker_may_stand_alone() -> None:
    assert from_mapping(NEEDED | {"train": {"report_to": "wandb"}}).train.report_to == ("wandb",)


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
    with pytest.raises(BadSettings) as caught:
        from_mapping(wrong, source="run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml has 13 faults: ")
    for part in (
        "output is missing",
        "data.max_length is 3",
        "alpha is 1.5: give a number of at most 1",
        "teachers.0.method is 'cdn': did you mean cdm? known: alm, byte-marginal, cdm, exact,",
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


def test_faults_of_a_method_are_listed_beside_those_of_the_teacher() -> None:
    teacher = {"method": "kl", "weight": 0, "temperature": 0, "dtype": "int8", "aligner": "dtw", "tau": 1}
    with pytest.raises(BadSettings) as caught:
        from_mapping(NEEDED | {"teachers": [teacher]})
    assert sorted(fault.split()[0] for fault in caught.value.faults) == [
        f"teachers.0.{name}" for name in ("aligner", "dtype", "model", "tau", "temperature", "weight")
    ]


def test_how_a_teacher_is_loaded() -> None:
    teachers = [
        {"model": "t", "dtype": "auto", "device": "cuda:1"},
        {
            "model": "t",
            "quantization": "4bit",
            "dtype": "auto",
            "device_map": {"model": "cuda:1", "lm_head": 2},
        },
        {"model": "t", "cache": "c", "method": "cdm", "aligner": "entropy-dtw", "entropy": "models"}
        | {"device": "cpu"},
    ]
    config = from_mapping(NEEDED | {"teachers": teachers})
    assert config.teachers[1].device_map == {"model": "cuda:1", "lm_head": 2}
    wrong = {"model": "t", "cache": "c", "weight": 0, "device": "cpu", "device_map": "auto"}
    with pytest.raises(BadSettings) as caught:
        from_mapping(NEEDED | {"teachers": [wrong | {"quantization": "4bit", "dtype": "float16"}]})
    assert sorted(fault.split()[0] for fault in caught.value.faults) == [
        f"teachers.0.{name}"
        for name in ("device", "device", "device_map", "dtype", "dtype", "quantization", "weight")
    ]


def test_a_method_may_be_given_by_an_alias_and_numbers_as_texts() -> None:
    teachers = [
        {"model": "t", "method": name, "temperature": "1e-1"} for name in ("em", "min_ed", "reverse_kl")
    ]
    config = from_mapping(NEEDED | {"teachers": teachers})
    assert [one.method for one in config.teachers] == ["exact", "min-ed", "reverse-kl"]
    assert {one.method_settings.temperature for one in config.teachers} == {0.1}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (
            {"method": "kl", "max_edit_distance": 0.2},
            "max_edit_distance is of no use to kl: it has temperature, top_k",
        ),
        (
            {"method": "uld", "match_digits": True, "rest_bucket": False},
            "match_digits is of no use to uld: .*rest_bucket is of no use to uld: ",
        ),
        ({"method": "alm", "temperature": 2}, "temperature is of no use to alm: it has tau"),
        ({"method": "cdm", "positions": "mean", "cache": "c"}, "no whole logits, which positions mean needs"),
        ({"max_edit_distance": 0.2}, "max_edit_distance is of no use to spelling"),
        ({"method": "cdm", "intra_group": False}, "intra_group is of no use to cdm"),
        ({"entropy": "models"}, "entropy models is of no use to aligner anchored"),
        ({"method": "kl", "aligner": "dtw"}, "aligner is of no use to kl, which is for one tokenizer"),
        ({"mapping": "near"}, "mapping is gone: give method cdm"),
        ({"mapping": "spelled"}, "mapping is gone: give method spelling"),
        ({"top_kk": 5}, "top_kk is no setting, did you mean top_k?"),
        ({"quantization": "4bit", "dtype": "bfloat16"}, "dtype goes not with quantization"),
        ({"device_map": "auto", "device": "cuda:1"}, "device goes not with device_map"),
        ({"cache": "c", "device_map": "auto"}, "device_map is of no use to a teacher of kind cached"),
        ({"cache": "c", "quantization": "8bit"}, "quantization is of no use to a teacher of kind cached"),
        ({"quantization": "5bit"}, "quantization is '5bit': give one of 4bit, 8bit"),
    ],
)
def test_an_option_that_a_method_does_not_look_at_is_a_fault(teacher: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSettings, match=reason):
        from_mapping(NEEDED | {"teachers": [{"model": "t"} | teacher]})


@pytest.mark.parametrize(
    ("teacher", "kind"),
    [
        ({}, "local"),
        ({"cache": "c"}, "cached"),
        ({"url": "http://localhost:8000"}, "served"),
        ({"url": ["http://a:1", "https://b"], "cache": "c"}, "served"),
    ],
)
def test_the_kind_of_a_teacher_need_not_be_said(teacher: dict[str, Any], kind: str) -> None:
    (made,) = from_mapping(NEEDED | {"teachers": [{"model": "t"} | teacher]}).teachers
    assert made.kind == kind


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ({"kind": "cached"}, "cache is missing: a teacher of kind cached needs it"),
        ({"kind": "served"}, "url is missing"),
        ({"kind": "local", "cache": "c"}, "cache is of no use to a teacher of kind local"),
        ({"cache": "c", "dtype": "float16"}, "dtype is of no use to a teacher of kind cached"),
        ({"engine": "vllm", "in_flight": 2}, "engine is of no use .*in_flight is of no use .* kind local"),
        ({"url": "http://host:8000/v1"}, "has a path too many: give http://host:8000"),
        ({"url": "host:8000"}, "is no address of a server: give one such as http://localhost:8000"),
        ({"url": "http://me:secret@host"}, "a password in it: api_key_env names the variable"),
        ({"url": "http://host", "api_key": "s"}, "api_key has no place in a file: api_key_env names the var"),
        ({"url": "http://host", "method": "cdm", "positions": "mean"}, "url has no whole logits"),
    ],
)
def test_settings_that_do_not_go_with_the_kind_are_faults(teacher: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSettings, match=reason):
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
    assert second.method_options == {"temperature": 0.8, "top_k": 100}, "kl takes what it has a use for"
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
    config = from_file(file, ["train.lr=2e-5", "teachers.0.intra_group=false", "alpha=0.25"])
    assert (config.train.lr, config.teachers[0].intra_group, config.alpha) == (2e-5, False, 0.25)
    assert from_file(file).train.lr == 3e-4, "YAML reads 3e-4 as a text, a run file as a number"


def test_what_is_written_of_a_config_makes_it_again() -> None:
    config = from_mapping(ONE | {"preset": "paper", "train": {"lora": {"rank": 4}}})
    assert from_mapping(config.model_dump(mode="json", exclude_unset=True)) == config
