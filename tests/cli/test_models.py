"""`cdm models fetch`: what a name stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdm_toolkit.hub import models, resolve


@pytest.mark.parametrize(
    ("name", "with_weights"), [("smollm2", True), ("mistral", False), ("some-one/model", True)]
)
def test_weights_come_where_the_name_stands_for_a_model(
    cdm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, with_weights: bool
) -> None:
    tokenizer, model = tmp_path / "tokenizer", tmp_path / "model"
    monkeypatch.setattr(resolve, "resolve", lambda name: resolve.Resolved(name, tokenizer, "hub", None))
    monkeypatch.setattr(models, "model_folder", lambda _: model)
    answer = cdm("models", "fetch", name, "--json")
    folder = str(model if with_weights else tokenizer)
    assert json.loads(answer.out) == [{"name": name, "origin": "hub", "folder": folder}]


def test_a_folder_with_a_tokenizer_alone_is_enough(cdm, tmp_path: Path, gpt2_view) -> None:
    (tmp_path / "tokenizer.json").write_bytes(
        (resolve.resolve("gpt2").folder / "tokenizer.json").read_bytes()
    )
    answer = cdm("models", "fetch", tmp_path, "--json")
    assert json.loads(answer.out)[0]["folder"] == str(tmp_path)
