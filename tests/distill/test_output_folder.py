"""Checkpoints: whole, damaged, missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdm_toolkit.distill.output_folder import check_seal, claim_output, last_checkpoint, seal_checkpoint
from cdm_toolkit.errors import BadArtifact, FileProblem


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-7"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "inner" / "state.json").write_text("{}")
    seal_checkpoint(folder)
    return folder


def test_only_a_sealed_checkpoint_is_whole(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").mkdir()
    assert last_checkpoint(tmp_path) == checkpoint
    check_seal(checkpoint)
    seal_checkpoint(tmp_path / "checkpoint-9")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9", "by number"


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "inner"])
def test_a_damaged_file_is_named(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    file = checkpoint / ("inner/state.json" if damage == "inner" else "model.safetensors")
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        file.write_bytes(b"\xff" + content[1:])
    with pytest.raises(BadArtifact, match=file.name):
        claim_output(tmp_path, overwrite=False, resume=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="no whole checkpoint"):
        claim_output(tmp_path, overwrite=False, resume=True)
