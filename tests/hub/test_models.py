"""Models by name: found, loaded, written and told apart."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdm_toolkit.errors import (
    BadOption,
    CdmError,
    FileProblem,
    MissingExtra,
    ModelNotLoaded,
    SourceNotFound,
    VocabularyTooSmall,
)
from cdm_toolkit.hub import models
from cdm_toolkit.hub.models import (
    has_weights,
    load_model,
    model_fingerprint,
    model_folder,
    model_folder_to_fill,
    resolve_device,
    stored_quantization,
    weights_kind,
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
    assert load_model(str(student), device_map="auto").device == torch.device("cpu")
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
    assert load_model(str(student), dtype="auto").dtype == torch.float32
    load_model(str(student), dtype="bfloat16").save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype="auto").dtype == torch.bfloat16


def test_attention_is_what_torch_has_whatever_the_configuration_asks(student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(student, tmp_path / "asks")
    config = json.loads((folder / "config.json").read_text())
    for asked in ("flash_attention_2", "eager"):
        (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": asked}))
        assert load_model(str(folder)).config._attn_implementation == "sdpa"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model whose widths are whole blocks of 64, as bitsandbytes has them."""
    folder = tmp_path_factory.mktemp("wide") / "one"
    try:
        new_student("smollm2", "1m", folder, entries=900, seed=3)
    except SourceNotFound as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="module")
def in_4bit(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model as it is when its weights were quantised."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("quantised")
    model = load_model(str(wide), quantization="4bit")
    assert model.get_memory_footprint() < 0.3 * load_model(str(wide)).get_memory_footprint()
    model.save_pretrained(folder)
    return folder


def test_a_quantised_checkpoint_is_loaded_as_it_is(in_4bit: Path, wide: Path) -> None:
    assert (stored_quantization(in_4bit), stored_quantization(wide)) == ("bitsandbytes", None)
    own, ours = load_model(str(in_4bit)), load_model(str(wide), quantization="4bit")
    assert {p.dtype for p in own.parameters()} == {torch.uint8, torch.float32}
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(own(ids).logits, ours(ids).logits)
    with pytest.raises(
        BadOption, match=r"`dtype` is 'bfloat16'; give auto: .* is quantised \(bitsandbytes\)"
    ):
        load_model(str(in_4bit), dtype="bfloat16")
    with pytest.raises(BadOption, match=r"`quantization` is '8bit'; give none: .* is quantised already"):
        load_model(str(in_4bit), quantization="8bit")


def test_kinds_of_weights(in_4bit: Path, student: Path, tmp_path: Path) -> None:
    """Say what a cache was made with; auto is the dtype that it stands for."""
    load_model(str(student), dtype="bfloat16").save_pretrained(tmp_path)
    found = [
        weights_kind(str(folder), dtype, quantization)
        for folder, dtype, quantization in (
            (student, None, None),
            (tmp_path, None, None),
            (tmp_path, "auto", None),
            (tmp_path, None, "8bit"),
            (in_4bit, None, None),
        )
    ]
    assert found == ["float32", "float32", "bfloat16", "8bit", "bitsandbytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32", "quantization": "4bit"}, "`dtype` and `quantization` do not go together"),
        ({"quantization": "3bit"}, "`quantization` is '3bit'; give one of 4bit, 8bit"),
        (
            {"device_map": "fair"},
            "`device_map` is 'fair'; give one of auto, balanced, balanced_low_0, sequential",
        ),
        ({"device_map": {"model": 7, "lm_head": "cpu"}}, "`device_map` is 'cuda:7'; give"),
        ({"device_map": {"lm_head": "cpu", "model.norm": "disk"}}, "a device for each part of"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_so_is_one_line(student: Path, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(CdmError) as caught:
        load_model(str(student), **options)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("missing", "options", "extra"),
    [
        ("accelerate", {"device_map": "auto"}, "train"),
        ("accelerate", {"quantization": "4bit"}, "train"),
        ("bitsandbytes", {"quantization": "8bit"}, "quantization"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    student: Path, missing: str, options: dict[str, Any], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(MissingExtra, match=rf'needs {missing}, .*pip install "cdm-toolkit\[{extra}\]"'):
        load_model(str(student), **options)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_quantised_checkpoint_names_the_package_that_it_needs(
    student: Path, method: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(student, tmp_path / method)
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(ModelNotLoaded, match=rf"it is quantised \({method}\): .*; install what it names"):
        load_model(str(folder))


@pytest.mark.slow
def test_weights_are_read_to_where_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they lie there once, and host memory holds one tensor at a time; on a CPU there is no second copy."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("a CPU build of torch needs a C++ compiler for this")
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    from benchmarks.load import load
    from benchmarks.trace import device_library

    monkeypatch.delenv("CDM_CACHE", raising=False)  # converted once for all, before it is measured
    model_folder("smollm2")
    library, beside = device_library(tmp_path), 48 * 2**20
    options: list[dict[str, str]] = [{"dtype": "bfloat16", "device": on} for on in ("cuda:1", "cpu")]
    if find_spec("bitsandbytes") is not None:
        options.append({"quantization": "4bit"})
    there, here, *small = load("smollm2", library, options)
    assert there["on_device"] == there["weights"] == here["weights"]
    assert there["peak_allocated"] < there["largest"] + beside < 0.5 * there["weights"]
    assert here["peak_allocated"] < here["weights"] + beside
    for each in small:
        assert each["peak_allocated"] < each["weights"] + beside < here["weights"]


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
