"""The suite files that are shipped, and the faults of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cdm_toolkit.errors import BadSettings, FileProblem, UnknownName
from cdm_toolkit.evaluation.suites import load_suite, suite_names


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_the_shipped_suites_load() -> None:
    assert {"bpb", "instruct", "math", "quickstart"} <= set(suite_names())
    assert all(load_suite(name).summary for name in ("bpb", "instruct", "math", "quickstart"))
    math = load_suite("math")
    assert math.summary.endswith("(the last number)")  # not cut at a #
    assert (math.adapter, math.data.hub, math.settings.tasks) == ("lm-eval", "openai/gsm8k", ("gsm8k",))
    assert load_suite("instruct").settings.seeds == (10, 20, 30, 40, 50)


def test_a_suite_can_be_a_file(tmp_path: Path) -> None:
    spec = load_suite(written(tmp_path, "adapter: bpb\ndata: {file: my.jsonl}\n"))
    assert (spec.name, spec.data.file, spec.settings.window) == ("mine", "my.jsonl", 1024)


def test_an_unknown_suite_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown suite 'maths'; did you mean math\? known: bpb, .*, all"):
        load_suite("maths")
    with pytest.raises(FileProblem, match="No such file"):
        load_suite(str(tmp_path / "none.yaml"))


def test_all_faults_of_a_part_are_listed_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "adapter: bpb\nsumary: x\ndata: {sample: dev, hub: 3}\n")
    with pytest.raises(BadSettings) as caught:
        load_suite(path)
    assert str(caught.value).removeprefix(path) == (
        " has 3 faults: data.sample is 'dev': give one of train, heldout, prose, languages; "
        "data.hub is 3: give a text; "
        "sumary is no setting, did you mean summary?; mend them and run again"
    )
    path = written(tmp_path, "adapter: lm-eval\nsettings: {fewshot: -1, max_new_tokens: many, shots: 5}\n")
    with pytest.raises(BadSettings) as caught:
        load_suite(path)
    assert str(caught.value).removeprefix(path) == (
        ", settings has 3 faults: fewshot is -1: give a number of at least 0; "
        "max_new_tokens is 'many': give a whole number; "
        "shots is no setting, did you mean fewshot?; mend them and run again"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds nothing: give a mapping"),
        ("[1]", "holds [1]: give a mapping"),
        ("summary: x", "adapter is missing"),
        (
            "adapter: rouge",
            "adapter is 'rouge': it is none of bpb, code, instruct, lm-eval: give its short name",
        ),
        ("adapter: no.such.module:Suite", "No module named 'no'"),
        ("adapter: mine.py:Suite", "there is no file"),
        ("adapter: cdm_toolkit.errors:BadRow", "has no attribute 'Settings'"),
        ("adapter: bpb\nsettings: 3", "settings is 3"),
        ("adapter: bpb\nsettings: {window: 1}", "window is 1: give a number of at least 2"),
    ],
)
def test_a_file_that_is_no_suite(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadSettings, match=re.escape(said)):
        load_suite(written(tmp_path, text))


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="is not YAML"):
        load_suite(written(tmp_path, "adapter: [bpb"))
