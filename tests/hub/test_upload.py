"""A finished student goes to the hub, or the error has the command that takes it there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdm_toolkit.errors import BadOption, FileProblem
from cdm_toolkit.hub.upload import check_login, upload

from .hub_server import Fault, Hub

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"a card"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    for name, data in FILES.items() | {
        ("checkpoint-4/model.safetensors", b"x"),
        ("runs/events", b"x"),
        ("samples.jsonl", b"x"),
        ("answers-of-teacher-0/held-out/part", b"x"),
        ("weights-for-vllm-0/step-1/model.safetensors", b"x"),
    }:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)
    return made


def test_the_model_goes_up_without_its_checkpoints(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine")
    check_login()
    assert upload(folder, "me/student", private=True) == f"{hub.endpoint}/me/student"
    repository = hub.repositories["me/student"]
    assert repository.commits[repository.refs["main"]] == FILES
    upload(folder, "me/student")
    assert {asked.authorization for asked in hub.asked} == {"Bearer mine"}


def test_no_login_is_told_before_a_run(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match="logged in: run hf auth login, or set HF_TOKEN"):
        check_login()
    monkeypatch.setenv("HF_TOKEN", "mine")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadOption, match="`push_to_hub` is True; give it where the hub answers: "):
        check_login()


def test_what_the_hub_refuses_is_one_line_with_the_way_out(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine")
    hub.faults.append(Fault("POST /api/models/me/student/commit", status=403))
    with pytest.raises(FileProblem) as caught:
        upload(folder, "me/student")
    said = str(caught.value)
    assert "the student is there, but me/student on the hub could not be written (" in said
    assert said.endswith(f"upload the folder: hf upload me/student {folder}")
    assert "\n" not in said
