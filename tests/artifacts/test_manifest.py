"""Headers of what is kept: what is written, what is refused, and what differs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cdm_toolkit.artifacts.code_fingerprint import code_fingerprint
from cdm_toolkit.artifacts.manifest import FileSum, Format, differences, sums_of, write_json
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.errors import BadArtifact, FileProblem

FORMAT = Format("a format", 3, "make it again", older=(2,), code=("errors.py",))
UNMARKED = Format("a format", 2, "make it again", older=(1,), unmarked=1)


def test_a_header_says_what_it_is_and_who_made_it(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", FORMAT.header(provenance(["cdm"]), rows=3))
    found = FORMAT.read(tmp_path / "x.json")
    assert list(found) == ["format", "version", "code", "rows", "provenance"]
    assert (found["version"], found["rows"], found["code"]) == (3, 3, code_fingerprint("errors.py"))
    assert found["provenance"]["command"] == "cdm"


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (
            {"format": "another", "version": 3},
            "this is no a format file; give another file, or make it again",
        ),
        ({"version": 3}, "this is no a format file"),
        ([], "this is no a format file"),
        ({"format": "a format"}, "it has format version None, this tool reads 3 and 2; make it again"),
        ({"format": "a format", "version": 1}, "it has format version 1, this tool reads 3 and 2; make"),
        (
            {
                "format": "a format",
                "version": 4,
                "provenance": {"versions": {"cdm-toolkit": "9.1"}},
            },
            "it has format version 4, this tool reads 3 and 2; it was made by cdm-toolkit 9.1; make it again",
        ),
    ],
)
def test_another_format_is_refused(header: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(header))
    with pytest.raises(BadArtifact, match=re.escape(told)):
        FORMAT.read(tmp_path / "x.json")


def test_older_and_unmarked_versions_are_read() -> None:
    assert FORMAT.check("x", {"format": "a format", "version": 2})
    assert UNMARKED.check("x", {"rows": 3}) == {"rows": 3}
    with pytest.raises(BadArtifact, match="no a format file"):
        UNMARKED.check("x", {"format": "another", "version": 1})


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="make it again"):
        FORMAT.read(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(BadArtifact, match=r"it is damaged .*; do this"):
        FORMAT.read(tmp_path / "x.json", "do this")


def test_files_are_known_again(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "a"
    file.write_bytes(b"abc")
    ((name, found),) = sums_of(tmp_path, [file]).items()
    assert name == "inner/a"
    known = FileSum(**found)
    known.check(file, "again")
    file.write_bytes(b"abd")
    known.check_size(file, "again")
    with pytest.raises(BadArtifact, match="its sha256 is"):
        known.check(file, "again")
    file.write_bytes(b"ab")
    with pytest.raises(BadArtifact, match="it has 2 bytes instead of 3; again"):
        known.check_size(file, "again")
    file.unlink()
    with pytest.raises(BadArtifact, match="it is missing"):
        known.check_size(file, "again")


def test_differences_are_said_in_one_way() -> None:
    there = {"k": 20, "name": "a", "data": "a" * 64, "on": True, "run": {"lr": 0.1, "gone": 1}}
    now = {"k": None, "name": "b", "data": "b" * 64, "on": True, "run": {"lr": 0.2, "new": 1}}
    assert list(differences(there, now)) == [
        "k is 20 there and not set now",
        "name is a there and b now",
        "data is aaaaaaaa… there and bbbbbbbb… now",
        "run.lr is 0.1 there and 0.2 now",
        "run.gone is only there",
        "run.new is only now",
    ]
    assert not list(differences(there, there))
