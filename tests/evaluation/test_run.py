"""Several models side by side, loaded from folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cdm_toolkit.errors import BadOption, BadRow, SourceNotFound
from cdm_toolkit.evaluation.run import Ask, Subject, evaluate, load_subject, start_token
from cdm_toolkit.hub.tokenizers import load_tokenizer

MakeSubject = Callable[..., Subject]


@pytest.fixture
def folders(make: MakeSubject, tmp_path: Path) -> list[str]:
    """Save one model as it is and one that knows nothing."""
    subject = make()
    for name in ("random", "uniform"):
        if name == "uniform":
            torch.nn.init.zeros_(subject.model.lm_head.weight)
        subject.model.save_pretrained(tmp_path / name)
        subject.tokenizer.save_pretrained(tmp_path / name)
    return [str(tmp_path / "random"), str(tmp_path / "uniform")]


def test_models_are_scored_side_by_side(folders: list[str]) -> None:
    seen: list[str] = []

    def follow(name: str) -> Callable[[int, int], None]:
        seen.append(name)
        return lambda done, total: None

    results = evaluate("quickstart", folders, ask=Ask(limit=4), progress=follow)
    assert [result.model for result in results] == folders == seen
    assert [result.scores[0].n for result in results] == [4, 4]
    assert results[0].scores[0].value != results[1].scores[0].value
    assert (
        evaluate("quickstart", folders[1:], ask=Ask(limit=4))[0].scores[0].value == results[1].scores[0].value
    )


def test_the_start_token_is_that_of_training(folders: list[str]) -> None:
    from cdm_toolkit.distill.data import side_of

    assert start_token(load_subject(folders[0]).tokenizer) == side_of(load_tokenizer(folders[0])).start


def test_faults_of_the_data_come_before_any_model_loads(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("[]\n")
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(BadRow, match="row 1: it is not a JSON object"):
        evaluate("bpb", [nowhere], ask=Ask(data=path))
    with pytest.raises(BadOption, match="--batch-size is 0"):
        evaluate("quickstart", [nowhere], batch_size=0)
    with pytest.raises(SourceNotFound, match="nowhere"):
        evaluate("quickstart", [nowhere])
