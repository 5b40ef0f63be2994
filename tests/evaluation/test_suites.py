"""The suite files that are shipped, and the faults of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cdm_toolkit.errors import BadRunConfig, FileProblem, UnknownName
from cdm_toolkit.evaluation.suites import load_suite, suite_names


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_the_shipped_suites_load() -> None:
    assert suite_names() == ("bpb", "math", "quickstart")
    assert all(load_suite(name).summary for name in suite_names())
    math = load_suite("math")
    assert (math.adapter, math.data.hub, math.settings.fewshot) == ("gsm8k", "openai/gsm8k", 5)
    assert math.settings.stop[0] == "Question:"


def test_a_suite_can_be_a_file(tmp_path: Path) -> None:
    spec = load_suite(written(tmp_path, "adapter: bpb\ndata: {file: my.jsonl}\n"))
    assert (spec.name, spec.data.file, spec.settings.window) == ("mine", "my.jsonl", 1024)


def test_an_unknown_suite_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UnknownName, match=r"unknown suite 'maths'; did you mean math\? known: bpb, math, quickstart"
    ):
        load_suite("maths")
    with pytest.raises(FileProblem, match="No such file"):
        load_suite(str(tmp_path / "none.yaml"))


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
adapter: gsm8k
sumary: x
data: {sample: dev, hub: 3}
settings: {fewshot: -1, max_new_tokens: many, stop: [1], shots: 5}
""",
    )
    with pytest.raises(BadRunConfig) as caught:
        load_suite(path)
    assert str(caught.value).removeprefix(path) == (
        " has 7 faults: sumary is not a setting: did you mean summary?; "
        "data.sample is 'dev': give one of train, heldout; data.hub is 3: give a text; "
        "settings.shots is not a setting: did you mean fewshot?; "
        "settings.fewshot is -1: give a whole number of at least 0; "
        "settings.max_new_tokens is 'many': give a whole number of at least 1; "
        "settings.stop is [1]: give a list of texts; mend them and run again"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds nothing: give a mapping with an adapter"),
        ("[1]", "holds [1]: give a mapping with an adapter"),
        ("adapter: rouge", "adapter is 'rouge': give one of bpb, gsm8k"),
        ("adapter: bpb\nsettings: 3", "settings is 3: give a mapping"),
        (
            "adapter: bpb\nsettings: {window: true}",
            "settings.window is True: give a whole number of at least 2",
        ),
    ],
)
def test_a_file_that_is_no_suite(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadRunConfig, match=re.escape(said)):
        load_suite(written(tmp_path, text))


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="is not YAML"):
        load_suite(written(tmp_path, "adapter: [bpb"))
