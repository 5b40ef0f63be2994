"""Models by name, and fresh students."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.errors import (
    BadOption,
    CdmError,
    FileProblem,
    ModelNotLoaded,
    OutputExists,
    SourceNotFound,
    VocabularyTooSmall,
)
from cdm_toolkit.hub import models
from cdm_toolkit.hub.models import (
    Shape,
    has_weights,
    load_model,
    model_folder_to_fill,
    new_student,
    parse_size,
    student_shape,
)
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer


@pytest.fixture(scope="module")
def mistral() -> Loaded:
    try:
        return load_tokenizer("mistral")
    except SourceNotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def student(mistral: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "one"
    new_student(mistral, "3m", folder, seed=3)
    return folder


@given(st.integers(300, 300_000), st.floats(1e6, 2e9))
def test_shapes_are_within_budget(vocab: int, parameters: float) -> None:
    try:
        shape = student_shape(vocab, round(parameters))
    except BadOption:
        assert Shape(64, 1).parameters(vocab) > 0.8 * parameters
        return
    assert abs(shape.parameters(vocab) / parameters - 1) <= models.TOLERANCE
    assert shape.hidden % 64 == 0


@pytest.mark.parametrize("size", ["", "m", "-1m", "ten", "nan", "inf", "0"])
def test_bad_sizes(size: str) -> None:
    with pytest.raises(BadOption, match="size"):
        parse_size(size)


def test_a_fresh_student_belongs_to_its_tokenizer(student: Path, mistral: Loaded) -> None:
    model = load_model(str(student))
    config = model.config
    assert model.num_parameters() == student_shape(32_000, 3_000_000).parameters(32_000)
    assert config.vocab_size == mistral.view.vocab_size == 32_000
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert config.tie_word_embeddings
    assert load_tokenizer(str(student)).view.fingerprint == mistral.view.fingerprint
    assert not model.training
    assert (student / "model.safetensors").stat().st_mode & 0o044


def test_its_weights_depend_on_the_seed_alone(student: Path, mistral: Loaded, tmp_path: Path) -> None:
    first = load_model(str(student)).get_input_embeddings().weight
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = new_student(mistral, "3m", tmp_path / "a", seed=3).get_input_embeddings().weight
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    other = new_student(mistral, "3m", tmp_path / "b", seed=4).get_input_embeddings().weight
    assert not torch.equal(first, other)


def test_an_output_that_is_not_empty_needs_overwrite(mistral: Loaded, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists):
        new_student(mistral, "3m", tmp_path)
    new_student(mistral, "3m", tmp_path, overwrite=True)
    load_model(str(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(OutputExists):
        new_student(mistral, "3m", tmp_path / "notes.txt", overwrite=True)
    with pytest.raises(FileProblem):
        new_student(mistral, "3m", "/proc/none/student")


def test_a_size_below_the_vocabulary_is_refused(mistral: Loaded, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"at least 2,\d+,\d+ parameters"):
        new_student(mistral, "1m", tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_filled_vanishes(tmp_path: Path) -> None:
    def fill() -> None:
        with model_folder_to_fill(tmp_path / "x") as folder:
            (folder / "config.json").write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    assert not list(tmp_path.iterdir())


def test_more_rows_than_ids_is_padding_and_fewer_is_an_error(student: Path, tmp_path: Path) -> None:
    model = load_model(str(student))
    for rows in (32_064, 31_990):
        folder = shutil.copytree(student, tmp_path / str(rows))
        model.resize_token_embeddings(rows)
        model.save_pretrained(folder)
        if rows > 32_000:
            assert load_model(str(folder)).config.vocab_size == rows
        else:
            with pytest.raises(VocabularyTooSmall, match="31990 embedding rows, its tokenizer 32000 ids"):
                load_model(str(folder))


def test_devices_and_dtypes(student: Path) -> None:
    assert load_model(str(student), dtype="bfloat16").dtype == torch.bfloat16
    for device in ("gpu", "xla", ""):
        with pytest.raises(BadOption, match="device"):
            load_model(str(student), device=device)
    with pytest.raises(BadOption, match="dtype"):
        load_model(str(student), dtype="int8")
    if torch.version.cuda is None:
        with pytest.raises(BadOption, match="CPU build of torch"):
            load_model(str(student), device="cuda")


def damaged(student: Path, folder: Path, file: str, content: bytes | None) -> str:
    copy = shutil.copytree(student, folder)
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    return str(copy)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no-such-model"}'),
        ("model.safetensors", None),
        ("model.safetensors", b"\0" * 100),
        ("tokenizer.json", b"[]"),
    ],
)
def test_damaged_folders(student: Path, tmp_path: Path, file: str, content: bytes | None) -> None:
    name = damaged(student, tmp_path / "damaged", file, content)
    with pytest.raises((ModelNotLoaded, FileProblem)) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-model", "no/such", "a/b/c", "./none"])
def test_unknown_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceNotFound, match=r"config\.json"):
        load_model(name)


def test_what_has_weights(student: Path, tmp_path: Path) -> None:
    assert has_weights("smollm2")
    assert has_weights(str(student))
    assert not has_weights("mistral")
    assert not has_weights(str(tmp_path))


def test_several_gguf_files_are_not_guessed_among(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelNotLoaded, match=r"a\.gguf, b\.gguf"):
        load_model(str(tmp_path))
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(CdmError, match=r"a\.gguf"):
        load_model(str(tmp_path))


@pytest.mark.slow
def test_smollm2_is_converted_once_and_speaks_english(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        folder = models.model_folder("smollm2")
    except SourceNotFound as error:
        pytest.skip(str(error))

    def convert(*_: object) -> None:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(models, "_convert", convert)
    model, loaded = load_model("smollm2"), load_tokenizer("smollm2")
    assert load_tokenizer(str(folder)).view.fingerprint == loaded.view.fingerprint
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ids = torch.tensor([loaded.view.encode("The capital of France is").ids.tolist()])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0])
