from __future__ import annotations

import errno
import os

import pytest

from cdm_toolkit.artifacts.atomic import atomic_folder, atomic_write
from cdm_toolkit.errors import FileProblem, OutputExists


def test_a_file_appears_whole_with_usual_permissions(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "sub" / "x").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_what_fails_leaves_no_trace(write, error, tmp_path):
    with pytest.raises(error), write(tmp_path / "x"):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_a_missing_parent_is_made(write, tmp_path):
    with write(tmp_path / "new" / "x"):
        pass
    assert (tmp_path / "new" / "x").exists()


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_a_place_that_cannot_be_is_said(write, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileProblem, match=r"x: cannot be written \(Not a directory"),
        write(tmp_path / "file" / "x"),
    ):
        pytest.fail("there is nothing to write to")


def test_a_folder_is_replaced_only_when_told(tmp_path):
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(OutputExists), atomic_folder(target):
        pytest.fail("it is not empty")
    with pytest.raises(ValueError, match="no"), atomic_folder(target, overwrite=True):
        raise ValueError("no")
    assert [path.name for path in target.iterdir()] == ["old"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "new"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileProblem, match="No space left on device"), atomic_write(path) as stream:
        stream.write(b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_does_not_replace_a_folder_with_something_in_it(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").touch()
    with pytest.raises(FileProblem), atomic_write(tmp_path / "x") as stream:
        stream.write(b"1")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "kept"]
