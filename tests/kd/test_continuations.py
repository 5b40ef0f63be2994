"""Predictions after continuations, beside one run of the model for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cdm_toolkit.kd import continuations
from cdm_toolkit.kd.continuations import ReadText

from .conftest import Side

TEXT = [5, 300, 17, 8, 250, 12]
VOCAB = 880
"""Fewer than the model's columns: the others are no outcome."""


def directly(teacher: Side, ids: Sequence[int]) -> np.ndarray:
    with torch.inference_mode():
        logits = teacher.model(input_ids=torch.tensor([list(ids)])).logits[0, -1, :VOCAB]
    return logits.log_softmax(-1).numpy()


@pytest.mark.parametrize("kept", [continuations.KEPT, 3])
@pytest.mark.parametrize("length", [1, 4, 6])
def test_equals_a_run_for_each(
    teacher: Side, length: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of different lengths in one batch, of known and of unknown parents, whose states were kept or not."""
    monkeypatch.setattr(continuations, "KEPT", kept)
    after = ReadText(teacher.model, TEXT, vocab=VOCAB).after(length)
    paths = [(), (7,), (9, 11), (9, 11, 200, 3), (40, 41, 42)]
    asked = [
        paths,
        [(*path, 77) for path in paths],
        [(*path, 77, 1, 2) for path in paths],
        [(7, 77), (8,)],
        [],
    ]
    for each in asked:
        found = after(each)
        assert found.shape == (len(each), VOCAB)
        for path, row in zip(each, found, strict=True):
            assert row == pytest.approx(directly(teacher, [*TEXT[:length], *path]), abs=1e-4)
