from __future__ import annotations

import re
from pathlib import Path

import pytest

from cdm_toolkit.compare.study import StudyConfig, from_file, grid

DOCS = Path(__file__).parents[2] / "docs" / "compare.md"


@pytest.fixture(scope="module")
def text() -> str:
    return DOCS.read_text(encoding="utf-8")


def test_the_study_of_the_documentation_is_one(text: str, tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert found
    (tmp_path / "study.yaml").write_text(found.group(1), encoding="utf-8")
    study = from_file(str(tmp_path / "study.yaml"))
    assert len(grid(study)) == 4 * 3 + 1 + 4


def test_every_key_of_a_study_is_documented_and_no_other(text: str) -> None:
    rows = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \|", text, re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(StudyConfig.model_fields)
