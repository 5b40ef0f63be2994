"""A model that does not fit is refused before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cdm_toolkit.errors import ModelNotLoaded
from cdm_toolkit.evaluation import memory
from cdm_toolkit.evaluation.evaluate import Subject, load_subject
from cdm_toolkit.evaluation.memory import available_bytes, check_fits, count_parameters

MakeSubject = Callable[..., Subject]
CPU = torch.device("cpu")


@pytest.fixture
def folder(make: MakeSubject, tmp_path: Path) -> Path:
    subject = make()
    subject.model.to(torch.bfloat16).save_pretrained(tmp_path)
    subject.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_parameters_are_counted_by_the_header(make: MakeSubject, folder: Path) -> None:
    expected = sum(weight.numel() for weight in make().model.parameters())
    assert count_parameters(folder) == expected
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    assert count_parameters(folder) is None  # loading it will say what is wrong
    assert count_parameters(folder / "none") is None


def test_a_model_that_does_not_fit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = count_parameters(folder) * 4
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    with pytest.raises(
        ModelNotLoaded, match=r"needs 0.0 GiB of memory in float32, 0.0 GiB are available on cpu"
    ):
        load_subject(str(folder))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * needed)
    check_fits("tiny", folder, CPU)
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    check_fits("tiny", folder, CPU)


def test_both_sources_agree_on_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    first = available_bytes(CPU)
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    second = available_bytes(CPU)
    if first is None or second is None:
        pytest.skip("this machine does not say what is left")
    assert first == pytest.approx(second, rel=0.2)
