from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from cdm_toolkit.artifacts.settings import Settings, make, read_yaml, with_settings
from cdm_toolkit.errors import BadSettings, FileProblem


class Inner(Settings):
    model: Annotated[str, Field(min_length=1)]
    method: Literal["cdm", "sft"] = "cdm"
    top_k: Annotated[int, Field(ge=1)] = 100


class Outer(Settings):
    rate: Annotated[float, Field(gt=0)] = 2e-5
    teachers: tuple[Inner, ...] = ()
    steps: Annotated[int, Field(ge=1)] | None = None


def test_a_number_without_a_point_is_read_as_one() -> None:
    """YAML 1.1 takes 2e-5 for a text."""
    assert make(Outer, with_settings({}, ["rate=2e-5"], source="--set"), source="x").rate == 2e-5


def test_all_faults_are_listed_at_once_with_the_nearest_name() -> None:
    faulty = {
        "rate": -1,
        "techers": 1,
        "steps": 1.5,
        "teachers": [{"model": "a", "method": "cdn", "top_k": 0, "modle": "b"}, {"model": ""}, {}],
    }
    with pytest.raises(BadSettings) as caught:
        make(Outer, faulty, source="run.yaml")
    assert str(caught.value) == (
        "run.yaml has 8 faults: rate is -1: give a number above 0; "
        "teachers.0.method is 'cdn': give one of cdm, sft (did you mean cdm?); "
        "teachers.0.top_k is 0: give a number of at least 1; "
        "teachers.0.modle is no setting, did you mean model?; "
        "teachers.1.model is '': give a text that is not empty; "
        "teachers.2.model is missing; "
        "steps is 1.5: give a whole number; "
        "techers is no setting, did you mean teachers?; mend them and run again"
    )


def test_assignments_reach_into_lists_and_leave_what_they_were_given() -> None:
    given = {"teachers": [{"model": "a"}]}
    assert with_settings(given, ["teachers.0.top_k=5", "rate=1"], source="--set") == {
        "teachers": [{"model": "a", "top_k": 5}],
        "rate": 1,
    }
    assert given == {"teachers": [{"model": "a"}]}


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ("teachers.3.top_k=5", "teachers has 1 entries"),
        ("alone", "give KEY=VALUE"),
        ("rate=[", "not YAML"),
        ("teachers.0.model.x=1", "teachers.0.model is 'a'"),
    ],
)
def test_an_assignment_without_a_place_is_a_fault(assignment: str, problem: str) -> None:
    with pytest.raises(BadSettings, match=problem):
        with_settings({"teachers": [{"model": "a"}]}, [assignment], source="--set")


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    with pytest.raises(FileProblem, match="No such file"):
        read_yaml(file)
    file.write_text("- 1\n")
    with pytest.raises(BadSettings, match="give a mapping"):
        read_yaml(file)
    file.write_text("a: [\n")
    with pytest.raises(FileProblem, match="not YAML"):
        read_yaml(file)
