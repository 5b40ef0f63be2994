"""Fresh students, and trained models that get another vocabulary."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

from cdm_toolkit.errors import BadOption, FileProblem, OutputExists, VocabularyTooSmall
from cdm_toolkit.hub import students
from cdm_toolkit.hub.embedding_rows import PIECE_NATS, new_rows, vocabulary_tables
from cdm_toolkit.hub.models import load_model, model_fingerprint, model_folder, save_model
from cdm_toolkit.hub.students import (
    Shape,
    Transplanted,
    new_student,
    parse_size,
    student_shape,
    transplant,
)
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.samples import sample_path
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.row_sources import SourceKind, row_sources


@pytest.fixture(scope="module")
def mistral(loaded: Callable[[str], Loaded]) -> Loaded:
    return loaded("mistral")


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
    assert abs(shape.parameters(vocab) / parameters - 1) <= students.TOLERANCE
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


def test_a_fresh_student_has_a_provenance(student: Path, mistral: Loaded) -> None:
    facts = json.loads((student / "provenance.json").read_text())
    assert (facts["seed"], facts["size"], facts["tokenizer"]) == (3, "3m", "mistral")
    assert facts["fingerprints"] == {"tokenizer": mistral.view.fingerprint}


# Another vocabulary

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PADDED = 64
"""Rows of the untied models beyond their tokenizer's ids."""


def _llama(vocab: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, tie_word_embeddings=False, **SIZES))


def _phi_with_a_bias(vocab: int) -> PreTrainedModel:
    model = PhiForCausalLM(PhiConfig(vocab_size=vocab, tie_word_embeddings=False, **SIZES))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.fixture(scope="module", params=[_llama, _phi_with_a_bias])
def untied(
    request: pytest.FixtureRequest, loaded: Callable[[str], Loaded], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Make a random model in bfloat16 over SmolLM2's tokenizer, with a head of its own and padding rows."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    folder.mkdir()
    torch.manual_seed(0)
    model = request.param(49_152 + PADDED).to(torch.bfloat16)
    for table in vocabulary_tables(model):
        table.data[49_152:] = math.nan
    model.generation_config.suppress_tokens = [48_000]
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    save_model(model, loaded("smollm2"), folder)
    return folder


@pytest.fixture(scope="module")
def moved(
    untied: Path, mistral: Loaded, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Transplanted]:
    """Transplant it onto Mistral's tokenizer."""
    folder = tmp_path_factory.mktemp("moved") / "out"
    return folder, transplant(str(untied), mistral, folder, seed=7)


def test_rows_come_from_where_they_should(
    untied: Path, moved: tuple[Path, Transplanted], mistral: Loaded, loaded: Callable[[str], Loaded]
) -> None:
    folder, given = moved
    old, smollm2 = load_model(str(untied)), loaded("smollm2").view
    new = load_model(str(folder))
    sources = row_sources(smollm2, mistral.view)
    tables = list(zip(vocabulary_tables(old), vocabulary_tables(new), strict=True))
    assert len(tables) == (3 if old.config.model_type == "phi" else 2)
    for before, after in tables:
        assert after.isfinite().all(), "padding rows have no part in it"
        for kind in SourceKind:
            for new_id in torch.from_numpy(sources.kind == kind).nonzero()[:50, 0].tolist():
                old_rows = before[sources.row(new_id)]
                if kind in (SourceKind.COPIED, SourceKind.BY_ROLE):
                    assert torch.equal(after[new_id], old_rows[0])
                elif kind == SourceKind.MEAN:
                    assert torch.equal(after[new_id], old_rows.mean(0).bfloat16().float())
    assert given.rows == sources.counts
    assert given.vocab_size == new.config.vocab_size == len(after) == 32_000
    assert given.parameters == new.num_parameters()


def test_the_body_and_the_dtype_are_kept(untied: Path, moved: tuple[Path, Transplanted]) -> None:
    old, new = load_model(str(untied), dtype="auto"), load_model(str(moved[0]), dtype="auto")
    assert new.dtype == torch.bfloat16
    own = {id(table) for model in (old, new) for table in vocabulary_tables(model)}
    body = [
        (name, a, b)
        for (name, a), (_, b) in zip(old.named_parameters(), new.named_parameters(), strict=True)
        if id(a) not in own
    ]
    assert len(body) > 10
    assert all(torch.equal(a, b) for _, a, b in body)


def test_special_ids_are_those_of_the_new_tokenizer(
    moved: tuple[Path, Transplanted], mistral: Loaded
) -> None:
    model = load_model(str(moved[0]))
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert model.generation_config.suppress_tokens is None
    assert model.generation_config.temperature == 0.5, "what names no id stays"
    assert load_tokenizer(str(moved[0])).view.fingerprint == mistral.view.fingerprint


def test_fresh_rows_are_of_the_embeddings_scale(
    smollm2_view: TokenizerView, deepseek_view: TokenizerView
) -> None:
    sources = row_sources(smollm2_view, deepseek_view)
    fresh = torch.from_numpy(sources.kind == SourceKind.FRESH)
    assert fresh.sum() > 1000
    table = torch.randn(49_200, 16, generator=torch.Generator().manual_seed(1)) * 3 + torch.arange(16)
    made = new_rows(table, sources, torch.Generator().manual_seed(0))[fresh]
    old = table[:49_152]
    torch.testing.assert_close(made.std(0), old.std(0), rtol=0.1, atol=0)
    torch.testing.assert_close(made.mean(0), old.mean(0), rtol=0, atol=0.4)


def test_a_mean_is_less_likely_for_each_piece(smollm2_view: TokenizerView, gpt2_view: TokenizerView) -> None:
    sources = row_sources(smollm2_view, gpt2_view)
    table = torch.randn(49_152, 16, generator=torch.Generator().manual_seed(1))
    state = torch.arange(16.0)
    plain, made = (new_rows(table, sources, torch.Generator().manual_seed(0), s) for s in (None, state))
    lower = (plain - made) @ state
    pieces = torch.tensor([len(sources.row(i)) for i in range(len(sources.kind))])
    expected = PIECE_NATS * torch.where(torch.from_numpy(sources.kind == SourceKind.MEAN), pieces - 1, 0)
    torch.testing.assert_close(lower, expected.float(), rtol=0, atol=1e-3)
    assert torch.equal(made[expected == 0], plain[expected == 0])


def test_texts_change_the_head_alone(
    untied: Path, moved: tuple[Path, Transplanted], mistral: Loaded, tmp_path: Path
) -> None:
    transplant(str(untied), mistral, tmp_path / "out", seed=7, texts=[TEXT, ""])
    plain, made = (
        vocabulary_tables(load_model(str(folder), dtype="auto")) for folder in (moved[0], tmp_path / "out")
    )
    assert [torch.equal(a, b) for a, b in zip(plain, made, strict=True)] == [True, False, True][: len(plain)]


def test_fresh_rows_depend_on_the_seed_alone(
    student: Path, mistral: Loaded, loaded: Callable[[str], Loaded], tmp_path: Path
) -> None:
    smollm2 = loaded("smollm2")
    fresh = torch.from_numpy(row_sources(mistral.view, smollm2.view).kind == SourceKind.FRESH)
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        state = torch.get_rng_state()
        given = transplant(str(student), smollm2, tmp_path / name, seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
        torch.manual_seed(99 + len(found))
        found.append(load_model(str(tmp_path / name)).get_input_embeddings().weight)
    assert given.rows.fresh == fresh.sum() > 10
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][~fresh], found[2][~fresh])
    assert not torch.isclose(found[0][fresh], found[2][fresh]).all(-1).any()


def test_a_receipt_says_what_it_was_made_of(
    untied: Path, moved: tuple[Path, Transplanted], mistral: Loaded
) -> None:
    folder, given = moved
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["fingerprints"]["source model"] == model_fingerprint(untied)
    assert facts["fingerprints"]["tokenizer"] == mistral.view.fingerprint
    assert (facts["source"], facts["tokenizer"], facts["seed"]) == (str(untied), "mistral", 7)
    assert facts["rows"]["mean"] == given.rows.mean > 9000


def test_a_model_can_be_replaced_by_its_transplant(student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(student, tmp_path / "model")
    before = load_model(str(folder))
    transplant(str(folder), "gpt2", folder, overwrite=True)
    after = load_model(str(folder))
    assert after.config.vocab_size == 50_257
    assert torch.equal(before.model.norm.weight, after.model.norm.weight)
    assert not (folder / "chat_template.jinja").exists(), "GPT-2 has none"


def test_too_few_rows_for_the_models_own_tokenizer(
    student: Path, loaded: Callable[[str], Loaded], tmp_path: Path
) -> None:
    folder = shutil.copytree(student, tmp_path / "wrong")
    loaded("smollm2").tokenizer.save_pretrained(folder)
    with pytest.raises(VocabularyTooSmall, match="32000 embedding rows, its tokenizer 49152 ids"):
        transplant(str(folder), "gpt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


TEXT = "Natalia sold 48 clips in April, and then half as many in May."


def test_a_small_tied_models_own_vocabulary_changes_nothing(
    student: Path, mistral: Loaded, tmp_path: Path
) -> None:
    transplant(str(student), mistral, tmp_path / "same")
    before, after = load_model(str(student)), load_model(str(tmp_path / "same"))
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight
    ids = mistral.view.encode(TEXT).ids.tolist()
    assert torch.equal(_logits(before, ids), _logits(after, ids))
    assert model_fingerprint(student) == model_fingerprint(tmp_path / "same")


@pytest.mark.slow
def test_smollm2_with_its_own_vocabulary_is_smollm2(loaded: Callable[[str], Loaded], tmp_path: Path) -> None:
    view = loaded("smollm2").view
    given = transplant("smollm2", loaded("smollm2"), tmp_path / "same")
    assert given.rows.mean == given.rows.fresh == 0
    before, after = load_model("smollm2"), load_model(str(tmp_path / "same"))
    ids = view.encode(TEXT).ids.tolist()
    assert torch.equal(_logits(before, ids), _logits(after, ids))
    assert model_fingerprint(model_folder("smollm2")) == model_fingerprint(tmp_path / "same")


def _bits_per_byte(model: PreTrainedModel, loaded: Loaded, text: str) -> float:
    ids = loaded.view.encode(text).ids.tolist()
    nats = torch.nn.functional.cross_entropy(_logits(model, ids)[:-1], torch.tensor(ids[1:]), reduction="sum")
    return nats.item() / math.log(2) / len(text.encode())


@pytest.mark.slow
def test_smollm2_still_speaks_through_mistrals_vocabulary(mistral: Loaded, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in sample_path("heldout").read_text("utf-8").splitlines()[:3]]
    text = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    transplant("smollm2", mistral, tmp_path / "out")
    own = _bits_per_byte(load_model("smollm2"), load_tokenizer("smollm2"), text)
    given = _bits_per_byte(load_model(str(tmp_path / "out")), mistral, text)
    uniform = math.log2(32_000) * len(mistral.view.encode(text)) / len(text.encode())
    assert own < given < uniform / 3, "a fresh model is near uniform"
