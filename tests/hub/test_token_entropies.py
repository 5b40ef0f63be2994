"""Entropies of a real model's predictions, and what they do to the paper's alignment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cdm_toolkit.cli import main
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.students import new_student
from cdm_toolkit.hub.token_entropies import batch_entropies, token_entropies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


@pytest.fixture
def fresh(tmp_path: Path) -> PreTrainedModel:
    """Make a small model whose predictions differ from place to place."""
    import torch

    torch.manual_seed(0)
    new_student("smollm2", "4m", tmp_path / "fresh")
    model = load_model(str(tmp_path / "fresh"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batches_give_what_each_sequence_gives_alone(
    fresh: PreTrainedModel, smollm2_view, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = smollm2_view.encode(TEXT).ids
    sequences = [ids[:3], ids, ids[:0], ids[2:9], np.tile(ids, 9), ids[:1]]
    vocab = smollm2_view.vocab_size
    with monkeypatch.context() as patch:
        patch.setattr("cdm_toolkit.forward.TOKENS_AT_ONCE", batch_tokens)
        together = batch_entropies(fresh, sequences, vocab=vocab)
    assert [len(found) for found in together] == [len(one) for one in sequences]
    for one, found in zip(sequences, together, strict=True):
        (alone,) = batch_entropies(fresh, [one], vocab=vocab)
        assert found == pytest.approx(alone, abs=1e-4)
    assert together[1] == pytest.approx(token_entropies(fresh, smollm2_view.encode(TEXT)), abs=1e-4)
    assert together[1][:3] == pytest.approx(together[0], abs=1e-4), "what follows changes nothing"
    assert np.ptp(together[1]) > 0.01
    assert batch_entropies(fresh, [], vocab=vocab) == []


def test_padded_rows_of_the_embedding_are_left_out(fresh: PreTrainedModel, smollm2_view) -> None:
    ids = smollm2_view.encode(TEXT).ids
    (all_ids,), (few,) = (batch_entropies(fresh, [ids], vocab=n) for n in (smollm2_view.vocab_size, 100))
    assert (few <= np.log(100) + 1e-6).all()
    assert (few < all_ids).all()


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
