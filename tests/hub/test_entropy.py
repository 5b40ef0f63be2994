"""Entropies of a real model's predictions, and what they do to the paper's alignment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cdm_toolkit.cli import main
from cdm_toolkit.hub.entropy import token_entropies
from cdm_toolkit.hub.models import load_model, new_student

TEXT = "Natalia's 48 clips were unbelievably colourful."


@pytest.mark.slow
def test_entropies_are_those_of_the_logits(smollm2_view) -> None:
    import torch

    model, spans = load_model("smollm2"), smollm2_view.encode(TEXT)
    found = token_entropies(model, spans)
    with torch.no_grad():
        logits = model(torch.from_numpy(spans.ids).long()[None]).logits[0].double().numpy()
    logits -= logits.max(-1, keepdims=True)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found == pytest.approx(-(probability * np.log(probability + 1e-300)).sum(-1), abs=1e-4)
    assert len(token_entropies(model, smollm2_view.encode(""))) == 0


@pytest.mark.slow
def test_models_weigh_the_papers_alignment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_student("mistral", "10m", tmp_path / "student")
    command = ["align", "show", TEXT, "--t1", "smollm2", "--t2", str(tmp_path / "student"), "--json"]
    assert main([*command, "--aligner", "entropy-dtw", "--entropy", "models"]) == 0
    weighed = json.loads(capsys.readouterr().out)
    assert main([*command, "--aligner", "entropy-dtw"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert weighed["t1"]["tokens"] == plain["t1"]["tokens"]
    assert [group["t1"] for group in weighed["groups"]][-1][1] == len(weighed["t1"]["tokens"])
    assert main([*command, "--entropy", "teacher"]) == 2
    assert "uniform, models" in capsys.readouterr().err
