"""`cdm student`: fresh models, and trained ones that get another vocabulary."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from cdm_toolkit.errors import SourceNotFound


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand in for a trained model."""
    from cdm_toolkit.hub.students import new_student

    folder = tmp_path_factory.mktemp("models") / "trained"
    try:
        new_student("mistral", "2.6m", folder)
    except SourceNotFound as error:
        pytest.skip(str(error))
    return folder


def refused(answer, *words: str) -> None:
    """Check that an answer is one line that says these words."""
    assert (answer.status, answer.out) == (2, ""), answer
    assert len(answer.err.splitlines()) == 1, answer.err
    for word in words:
        assert word in answer.err, answer.err


def test_a_fresh_student_says_its_shape(cdm, tmp_path: Path) -> None:
    answer = cdm("student", "new", "--size", "4m", "--tokenizer", "mistral", "-o", tmp_path / "s")
    assert answer.status == 0, answer.err
    assert "32,000 ids of mistral" in answer.out
    assert (tmp_path / "s" / "provenance.json").is_file()


def test_a_transplant_says_where_its_rows_come_from(cdm, trained: Path, tmp_path: Path) -> None:
    command = ("student", "transplant", "--from", trained, "--tokenizer", "gpt2")
    answer = cdm(*command, "-o", tmp_path / "a")
    assert answer.status == 0, answer.err
    assert "50,257 ids of gpt2: 21,240 copied, 1 by role, 29,016 means of several, 0 fresh" in answer.out
    assert answer.err == ""
    answer = cdm(*command, "-o", tmp_path / "b", "--json", "--seed", 4)
    said = json.loads(answer.out)
    assert said["rows"] == {"copied": 21_240, "by_role": 1, "mean": 29_016, "fresh": 0, "omp": 0}
    provenance = json.loads((tmp_path / "b" / "provenance.json").read_text())
    assert (provenance["rows"], provenance["seed"]) == (said["rows"], 4)
    assert (
        sum(said["rows"].values()) == json.loads((tmp_path / "b" / "config.json").read_text())["vocab_size"]
    )


def test_a_vocabulary_is_cut(cdm, trained: Path, tmp_path: Path) -> None:
    from cdm_toolkit.hub.models import load_model
    from cdm_toolkit.hub.tokenizers import load_tokenizer

    gpt2 = ("--tokenizer", "gpt2", "--entries", 3000)
    answer = cdm("student", "new", "--size", "1m", *gpt2, "-o", tmp_path / "new")
    assert answer.status == 0, answer.err
    assert "3,000 ids of gpt2" in answer.out
    answer = cdm("student", "transplant", "--from", trained, *gpt2, "-o", tmp_path / "moved", "--json")
    assert sum(json.loads(answer.out)["rows"].values()) == 3000
    for name in ("new", "moved"):
        folder = tmp_path / name
        tokenizer, config = load_tokenizer(str(folder)), load_model(str(folder)).config
        assert tokenizer.view.vocab_size == config.vocab_size == 3000
        assert tokenizer.tokenizer.eos_token_id == config.eos_token_id == 2999
        assert json.loads((folder / "provenance.json").read_text())["tokenizer"] == "gpt2 cut to 3000"


def test_layers_are_left_out(cdm, trained: Path, tmp_path: Path) -> None:
    from cdm_toolkit.hub.models import load_model

    there = load_model(str(trained)).config.num_hidden_layers
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "What is 2 + 2?", "completion": "4"}\n')
    command = ("student", "transplant", "--from", trained, "--layers", there - 1, "--data", data)
    answer = cdm(*command, "-o", tmp_path / "a")
    assert answer.status == 0, answer.err
    assert f"; {there - 1} of {there} layers, without those of least influence: " in answer.out
    said = json.loads(cdm(*command, "--tokenizer", "gpt2", "-o", tmp_path / "b", "--json").out)
    assert len(said["layers"]["influence"]) == there
    assert said["layers"]["removed"] == [min(range(there), key=said["layers"]["influence"].__getitem__)]
    assert said["rows"]["mean"] == 29_016
    assert load_model(str(tmp_path / "b")).config.num_hidden_layers == there - 1


def test_layers_that_cannot_be_left_out(cdm, trained: Path, tmp_path: Path) -> None:
    from cdm_toolkit.hub.models import load_model

    there = load_model(str(trained)).config.num_hidden_layers
    command = ("student", "transplant", "--from", trained, "-o", tmp_path / "out")
    for layers in (0, there + 1):
        refused(cdm(*command, "--layers", layers), f"--layers is {layers}", "the model has")
    refused(cdm(*command, "--layers", 1, "--data", "none.jsonl"), "none.jsonl", "no such file")
    assert not (tmp_path / "out").exists()


def test_rows_after_a_donor(cdm, small_models: Path, tmp_path: Path) -> None:
    command = ("student", "transplant", "--from", small_models / "teacher", "-o", tmp_path / "out")
    refused(cdm(*command, "--embeddings", "omp"), "--embeddings is 'omp'", "--donor")
    refused(cdm(*command, "--donor", "gpt2", "--tokenizer", "gpt2"), "--embeddings is 'mean'", "--donor")
    answer = cdm(*command, "--embeddings", "omp", "--donor", small_models / "student", "--k", 5)
    assert answer.status == 0, answer.err
    assert "0 means of several, 0 fresh, " in answer.out
    assert answer.out.rstrip().endswith(" by omp")
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["donor"]["k"] == 5


def test_a_cut_that_is_not_possible(cdm, trained: Path, tmp_path: Path) -> None:
    command = ("student", "transplant", "--from", trained, "-o", tmp_path / "out")
    refused(cdm(*command, "--tokenizer", "gpt2", "--entries", 100), "entries is 100", "257 to 50257")
    refused(cdm(*command, "--tokenizer", "mistral", "--entries", 3000), "mistral is SentencePiece BPE")
    refused(cdm(*command, "--tokenizer", "gpt2", "--entries", 0), "--entries")
    assert not (tmp_path / "out").exists()


def test_unknown_names(cdm, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(cdm("student", "transplant", "--from", "no-such", "--tokenizer", "gpt2", "-o", out), "'no-such'")
    refused(cdm("student", "transplant", "--from", trained, "--tokenizer", "gpt3", "-o", out), "'gpt3'")
    refused(cdm("student", "transplant", "--from", trained, "-o", out), "--tokenizer, --entries or --layers")
    assert not out.exists()


def test_a_name_without_weights(cdm, trained: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(trained, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    command = ("student", "transplant", "--tokenizer", "gpt2", "-o", tmp_path / "out", "--from")
    refused(cdm(*command, bare), "has no weights")
    refused(cdm(*command, "mistral"), "'mistral'", "*.safetensors")
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists(cdm, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    command = ("student", "transplant", "--from", trained, "--tokenizer", "gpt2")
    refused(cdm(*command, "-o", tmp_path), "--overwrite")
    refused(cdm(*command, "-o", tmp_path / "mine.txt", "--overwrite"), "exists")
    refused(cdm(*command, "-o", "/proc/no/such"), "/proc/no/such")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_vocabulary_larger_than_the_models_embedding(cdm, trained: Path, tmp_path: Path) -> None:
    from cdm_toolkit.hub.resolve import resolve

    wrong = shutil.copytree(trained, tmp_path / "wrong")
    shutil.copy(resolve("smollm2").folder / "tokenizer.json", wrong)
    command = ("student", "transplant", "--from", wrong, "--tokenizer", "gpt2", "-o", tmp_path / "out")
    refused(cdm(*command), "32000 embedding rows", "49152 ids")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(
    cdm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)  # behind the weights
    kept = shutil.copytree(trained, tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    for out in (tmp_path / "out", kept):
        command = ("student", "transplant", "--from", trained, "--tokenizer", "gpt2", "-o", out)
        refused(cdm(*command, "--overwrite"), "cannot be written", "No space left on device")
    assert not (tmp_path / "out").exists()
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
