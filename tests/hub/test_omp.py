"""Rows of new tokens by orthogonal matching pursuit: the authors' code, a plain twin, and whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cdm_toolkit.errors import CdmError
from cdm_toolkit.hub.embedding_rows import vocabulary_tables
from cdm_toolkit.hub.models import load_model, save_model
from cdm_toolkit.hub.omp import Donor, matching_pursuit, rows_by_omp, shared_tokens
from cdm_toolkit.hub.students import new_student, transplant
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.vocab_map.row_sources import SourceKind, row_sources

GOLDEN = Path(__file__).parents[1] / "data" / "omp_golden.npz"
"""Inputs and outputs of arcee-ai/mergekit, mergekit/tokensurgeon/omp.py at the commit in the file."""


def test_the_pursuit_is_that_of_its_authors() -> None:
    golden = np.load(GOLDEN)
    targets, atoms = (torch.from_numpy(golden[name]) for name in ("targets", "atoms"))
    chosen, coefficients = matching_pursuit(targets, atoms, int(golden["k"]))
    assert np.array_equal(chosen.numpy(), golden["chosen"])
    assert coefficients.numpy() == pytest.approx(golden["coefficients"], abs=1e-10)


def pursuit_reference(target: np.ndarray, atoms: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """Solve a whole least-squares problem at each step."""
    chosen: list[int] = []
    residual = target
    for _ in range(k):
        correlation = np.abs(atoms @ residual)
        correlation[chosen] = -1
        chosen.append(int(correlation.argmax()))
        coefficients = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        residual = target - atoms[chosen].T @ coefficients
    return chosen, coefficients


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_pursuit_is_its_plain_twin(k: int) -> None:
    draw = torch.Generator().manual_seed(k)
    targets, atoms = (torch.randn(n, 20, generator=draw, dtype=torch.float64) for n in (5, 30))
    chosen, coefficients = matching_pursuit(targets, atoms, k)
    for i, target in enumerate(targets.numpy()):
        expected = pursuit_reference(target, atoms.numpy(), k)
        assert chosen[i].tolist() == expected[0]
        assert coefficients[i].numpy() == pytest.approx(expected[1], abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_atoms_that_add_nothing_do_no_harm(dtype: torch.dtype) -> None:
    """Doubled atoms, more of them than the space has dimensions, and a target that is one of them."""
    draw = torch.Generator().manual_seed(0)
    atoms = torch.randn(6, 4, generator=draw, dtype=dtype).repeat(2, 1)
    targets = torch.stack([atoms[2], torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)])
    chosen, coefficients = matching_pursuit(targets, atoms, 64)
    assert chosen.shape == coefficients.shape == (3, 12)
    assert all(len(set(row)) == 12 for row in chosen.tolist())
    assert coefficients.isfinite().all()
    torch.testing.assert_close(torch.einsum("tk,tkh->th", coefficients, atoms[chosen]), targets)


# Models


@pytest.fixture(scope="module")
def source(loaded: Callable[[str], Loaded], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model with GPT-2's first 700 ids."""
    folder = tmp_path_factory.mktemp("source") / "model"
    new_student(loaded("gpt2"), "200k", folder, entries=700, seed=1)
    return folder


@pytest.fixture(scope="module")
def donor(source: Path, loaded: Callable[[str], Loaded], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model with SmolLM2's first 1,100 ids, each of which is a turned row of the source's or a sum of two."""
    folder = tmp_path_factory.mktemp("donor") / "model"
    new_student(loaded("smollm2"), "1m", folder, entries=1100, seed=2)
    model, tokenizer = load_model(str(folder), dtype="auto"), load_tokenizer(str(folder))
    old = load_tokenizer(str(source)).view
    rows = load_model(str(source), dtype="auto").get_input_embeddings().weight.detach()
    turned = rows @ _turn(rows.shape[1], model.config.hidden_size)
    found = row_sources(old, tokenizer.view)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        for new_id in np.flatnonzero(found.kind != SourceKind.FRESH):
            table[new_id] = turned[found.row(int(new_id))].sum(0)
    save_model(model, tokenizer, folder)
    return folder


def _turn(narrow: int, wide: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(wide, narrow, generator=torch.Generator().manual_seed(0)))[0].T


def test_rows_that_are_sums_of_shared_rows_are_found(source: Path, donor: Path, tmp_path: Path) -> None:
    given = transplant(str(source), None, tmp_path / "out", donor=Donor(str(donor), 8))
    old, new = load_model(str(source)), load_model(str(tmp_path / "out"))
    before, after = (model.get_input_embeddings().weight.detach() for model in (old, new))
    sources = row_sources(load_tokenizer(str(source)).view, load_tokenizer(str(donor)).view)
    right = 0
    for new_id, kind in enumerate(sources.kind):
        if kind in (SourceKind.COPIED, SourceKind.BY_ROLE):
            assert torch.equal(after[new_id], before[sources.row(new_id)[0]])
        elif kind == SourceKind.MEAN:
            right += torch.allclose(after[new_id], before[sources.row(new_id)].sum(0), atol=1e-4)
    assert given.rows is not None
    assert (given.rows.mean, given.rows.omp) == (0, sources.counts.mean + sources.counts.fresh)
    assert right > 0.9 * sources.counts.mean > 300, "not means, but what the donor says"
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert facts["donor"] == {"model": str(donor), "k": 8}
    assert {"donor model", "donor tokenizer"} <= facts["fingerprints"].keys()
    assert load_tokenizer(str(tmp_path / "out")).view.fingerprint == facts["fingerprints"]["donor tokenizer"]


def test_what_the_donor_lacks_is_a_mean(source: Path, donor: Path, tmp_path: Path) -> None:
    given = transplant(str(source), "smollm2", tmp_path / "out", entries=1500, donor=Donor(str(donor), 2))
    means = transplant(str(source), "smollm2", tmp_path / "means", entries=1500)
    assert given.rows is not None
    assert means.rows is not None
    assert given.rows.mean + given.rows.omp + given.rows.fresh == means.rows.mean + means.rows.fresh
    assert 300 < given.rows.mean < means.rows.mean
    old, new = (load_tokenizer(str(path)).view for path in (source, tmp_path / "out"))
    targets = shared_tokens(load_tokenizer(str(donor)).view, old, new).targets_new
    assert given.rows.omp == len(targets)
    table, plain = (
        load_model(str(tmp_path / name)).get_input_embeddings().weight for name in ("out", "means")
    )
    rest = np.setdiff1d(np.arange(1500), targets)
    assert torch.equal(table[rest], plain[rest])


def test_an_untied_heads_rows_are_made_after_the_donors_head(
    loaded: Callable[[str], Loaded], tmp_path: Path
) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tables = {}
    for seed, (name, ids) in enumerate({"gpt2": 50_257, "qwen2": 151_700}.items()):
        torch.manual_seed(seed)
        model = PhiForCausalLM(PhiConfig(vocab_size=ids, tie_word_embeddings=False, **size))
        (tmp_path / name).mkdir()
        save_model(model, loaded(name), tmp_path / name)
        tables[name] = [table.detach() for table in vocabulary_tables(model)]
    cut = {"entries": 3000, "donor": Donor(str(tmp_path / "gpt2"), 3)}
    transplant(str(tmp_path / "qwen2"), "gpt2", tmp_path / "out", **cut)
    made = vocabulary_tables(load_model(str(tmp_path / "out"), dtype="auto"))
    gpt2, qwen2 = loaded("gpt2").view, loaded("qwen2").view
    new = load_tokenizer(str(tmp_path / "out")).view
    tokens = shared_tokens(gpt2, qwen2, new)
    assert len(tokens.targets_new) > 10
    for old, donor, table in zip(tables["qwen2"][:2], tables["gpt2"][:2], made[:2], strict=True):
        assert torch.equal(table[tokens.targets_new], rows_by_omp(old, donor, tokens, 3))


def test_a_donor_that_shares_nothing_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = load_tokenizer(str(source)).view
    monkeypatch.setattr("cdm_toolkit.hub.omp.partners", lambda _, new: np.full(new.vocab_size, -1))
    with pytest.raises(CdmError, match="shares no token"):
        shared_tokens(view, view, view)
