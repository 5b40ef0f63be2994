"""Models by name: found, loaded, written and told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdm_toolkit.errors import (
    BadOption,
    CdmError,
    FileProblem,
    ModelNotLoaded,
    SourceNotFound,
    VocabularyTooSmall,
)
from cdm_toolkit.hub import models
from cdm_toolkit.hub.models import (
    has_weights,
    load_as_stored,
    load_model,
    model_fingerprint,
    model_folder_to_fill,
    resolve_device,
)
from cdm_toolkit.hub.students import new_student
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


def test_a_folder_that_is_not_filled_vanishes(tmp_path: Path) -> None:
    def fill() -> None:
        with model_folder_to_fill(tmp_path / "x") as folder:
            (folder / "config.json").write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    assert not list(tmp_path.iterdir())


def test_a_model_inherits_nothing_from_the_one_that_it_replaces(tmp_path: Path) -> None:
    for name in ("chat_template.jinja", "provenance.json", "config.json", "notes.txt", "map.safetensors"):
        (tmp_path / name).write_text("old")
    with model_folder_to_fill(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"config.json": "new", "notes.txt": "old", "map.safetensors": "old"}


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


@pytest.mark.parametrize(
    ("cuda", "metal", "taken"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_best_device_that_is_here(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, metal: bool, taken: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: metal)
    assert resolve_device("auto") == torch.device(taken)
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_named_device_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", "mps", "gpu", ""):
        with pytest.raises(BadOption, match="device"):
            resolve_device(device)


def test_a_model_is_loaded_as_it_is_stored(student: Path, tmp_path: Path) -> None:
    assert load_as_stored(str(student)).dtype == torch.float32
    load_model(str(student), dtype="bfloat16").save_pretrained(tmp_path)
    assert load_as_stored(str(tmp_path)).dtype == torch.bfloat16


def test_attention_is_what_torch_has_whatever_the_configuration_asks(student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(student, tmp_path / "asks")
    config = json.loads((folder / "config.json").read_text())
    for asked in ("flash_attention_2", "eager"):
        (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": asked}))
        assert load_model(str(folder)).config._attn_implementation == "sdpa"


def rewritten(student: Path, folder: Path, name: str, index: int) -> Path:
    """Copy a model with one number of one tensor changed."""
    copy = shutil.copytree(student, folder)
    weights = load_file(copy / "model.safetensors")
    weights[name].view(-1)[index] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_fingerprint_tells_models_apart_by_content_alone(student: Path, tmp_path: Path) -> None:
    own = model_fingerprint(student)
    assert len(own) == 64
    copy = shutil.copytree(student, tmp_path / "copy")
    (copy / "provenance.json").write_text("{}")
    config = json.loads((copy / "config.json").read_text())
    named = {**dict(reversed(config.items())), "_name_or_path": "x", "transformers_version": "4.0"}
    (copy / "config.json").write_text(json.dumps(named))
    assert model_fingerprint(copy) == model_fingerprint(str(copy)) == own
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert model_fingerprint(copy) != own
    changed = [
        rewritten(student, tmp_path / f"{name}{index}", name, index)
        for name, index in (("model.norm.weight", 0), ("model.embed_tokens.weight", 1_000_003))
    ]
    assert len({own, *map(model_fingerprint, changed)}) == 3


def test_a_large_weight_file_is_sampled(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "HASHED_WHOLE", 3 << 20)
    copy = shutil.copytree(student, tmp_path / "copy")
    file = copy / "model.safetensors"
    whole, size = file.read_bytes(), file.stat().st_size
    assert size > 6 << 20
    own = model_fingerprint(copy)
    for at, seen in (
        (0, True),
        (1 << 19, True),
        (5 << 20, True),
        (size - 1, True),
        ((5 << 20) + (1 << 19), False),
    ):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert (model_fingerprint(copy) != own) == seen, at


def test_what_has_no_fingerprint(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotLoaded, match="no weights"):
        model_fingerprint(tmp_path)
    copy = shutil.copytree(student, tmp_path / "copy")
    for content in ("[]", "{"):
        (copy / "config.json").write_text(content)
        with pytest.raises(FileProblem, match="not a model's configuration"):
            model_fingerprint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileProblem, match="No such file"):
        model_fingerprint(copy)


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
