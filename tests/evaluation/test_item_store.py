"""Finished items on disk: what a killed run leaves is what the next one goes on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdm_toolkit.errors import BadArtifact, FileProblem
from cdm_toolkit.evaluation.item_store import file_name, open_items
from cdm_toolkit.evaluation.scores import Item

RUN = {"data": "a" * 64, "batch_size": None}
ITEMS = [
    Item("1", {"right": 1.0}, "p", "g\n\u2028\r", "r", {"seed": 3}, 0.25),
    Item("2", {"right": 0.0}, generation="\ud800 half"),
    Item("3", {"bits": 1 / 3}),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "suite" / "model.jsonl"
    with open_items(path, RUN) as file:
        for item in ITEMS:
            file.keep(item)
    return path


def test_items_come_back_as_they_were(path: Path) -> None:
    with open_items(path, RUN) as file:
        assert list(file.items.values()) == ITEMS
        with pytest.raises(ValueError, match="finished already"):
            file.keep(ITEMS[0])
    lines = path.read_bytes().splitlines()
    assert [json.loads(line).get("key") for line in lines] == [None, "1", "2", "3"]


def test_a_file_cut_anywhere_has_the_whole_items_before(path: Path) -> None:
    content = path.read_bytes()
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        whole = max(0, content[:cut].count(b"\n") - 1)
        with open_items(path, RUN) as file:
            assert list(file.items.values()) == ITEMS[:whole]
            for item in ITEMS[whole:]:
                file.keep(item)
        assert path.read_bytes() == content, cut


def test_another_run_is_refused_with_the_difference(path: Path) -> None:
    before = path.read_bytes()
    with (
        pytest.raises(
            BadArtifact,
            match=r"another run: data is aaaaaaaa… there and bbbbbbbb… now; batch_size is not set there and 8 now",
        ),
        open_items(path, {"data": "b" * 64, "batch_size": 8}),
    ):
        pass
    assert path.read_bytes() == before
    with open_items(path, {"data": "b" * 64}, overwrite=True) as file:
        assert not file.items
    assert json.loads(path.read_text()) == {"run": {"data": "b" * 64}}


def test_a_damaged_or_foreign_file_is_refused(path: Path, tmp_path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"key": "2"', b'"kye": "2"'))
    with pytest.raises(BadArtifact, match="line 3 is no finished item"), open_items(path, RUN):
        pass
    path.write_text("my notes\n")
    with pytest.raises(BadArtifact, match="does not say which run"), open_items(path, RUN):
        pass
    assert path.read_text() == "my notes\n"
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileProblem, match="cannot be written"),
        open_items(tmp_path / "file" / "m.jsonl", RUN),
    ):
        pass


def test_two_runs_do_not_write_to_one_file(path: Path) -> None:
    with (
        open_items(path, RUN),
        pytest.raises(FileProblem, match="another run writes to it"),
        open_items(path, RUN),
    ):
        pass


def test_names_of_models_are_names_of_files() -> None:
    names = ["smollm2", "out/student", "out-student", "../out/student", "a/" * 90, "org/name", ".", "ü"]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all("/" not in name and not name.startswith(".") and len(name) < 100 for name in made)
