"""DistillKit's bytes: read as its own code reads them, and written so that it reads them.

The golden file has what github.com/arcee-ai/DistillKit makes at commit a61c2e7d of 6 positions of random logits, for
each way to compress: its bytes, and what it decodes of them. `ours` are bytes that `encode` has made, with what
DistillKit decodes of these.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cdm_toolkit.errors import BadOption, BadSettings, FileProblem
from cdm_toolkit.integrations.distillkit_format import (
    LegacyPolynomial,
    Quantised,
    Uncompressed,
    read_compression,
)

GOLDEN = dict(np.load(Path(__file__).parents[1] / "data" / "distillkit_golden.npz"))
NAMES = sorted({name.partition("/")[0] for name in GOLDEN})
WRITTEN = [name for name in NAMES if not name.startswith("legacy")]


def compression(name: str) -> Quantised | LegacyPolynomial:
    settings = json.loads(str(GOLDEN[f"{name}/config"]))
    if "legacy_logit_compression" in settings:
        return LegacyPolynomial(**settings["legacy_logit_compression"])
    return Quantised(**settings)


def columns(name: str, way: Quantised | LegacyPolynomial, whose: str = "") -> dict[str, np.ndarray]:
    return {column: GOLDEN[f"{name}/{whose}{column}"] for column in way.columns}


@pytest.mark.parametrize("name", NAMES)
def test_what_distillkit_writes_is_read_as_it_reads_it(name: str) -> None:
    way = compression(name)
    ids, logprobs = way.decode(columns(name, way))
    assert np.array_equal(ids, GOLDEN[f"{name}/ids"])
    assert np.array_equal(logprobs, GOLDEN[f"{name}/decoded"].astype(np.float32))


@pytest.mark.parametrize("name", WRITTEN)
def test_distillkit_reads_what_is_written_as_we_do(name: str) -> None:
    way = compression(name)
    ids, logprobs = way.decode(columns(name, way, "ours/"))
    assert np.array_equal(ids, GOLDEN[f"{name}/ids"])
    assert np.array_equal(logprobs, GOLDEN[f"{name}/ours/decoded"].astype(np.float32))


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_as_near_as_distillkit_comes(name: str) -> None:
    way, wanted = compression(name), GOLDEN[f"{name}/logprobs"]
    written = way.encode(GOLDEN[f"{name}/ids"], wanted)
    ids, logprobs = way.decode(written)
    assert np.array_equal(ids, GOLDEN[f"{name}/ids"])
    assert np.array_equal(written["bytepacked_indices"], GOLDEN[f"{name}/bytepacked_indices"])
    own, theirs = (np.sqrt(((each - wanted) ** 2).mean()) for each in (logprobs, GOLDEN[f"{name}/decoded"]))
    assert own <= 1.1 * theirs + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_no_positions_have_no_candidates(name: str) -> None:
    way = compression(name)
    none = {column: values[:0] for column, values in columns(name, way).items()}
    ids, logprobs = way.decode(none)
    assert ids.shape == logprobs.shape == (0, GOLDEN[f"{name}/ids"].shape[1])
    if name in WRITTEN:
        written = way.encode(ids, logprobs)
        assert {column: values.shape for column, values in written.items()} == {
            column: values.shape for column, values in none.items()
        }


def test_candidates_that_are_not_compressed_stay_as_they_are() -> None:
    ids, logprobs = (
        np.array([[3, 1], [2, 0]], np.int32),
        np.log(np.array([[0.5, 0.25], [0.9, 0.1]], np.float32)),
    )
    found = Uncompressed().decode(Uncompressed().encode(ids, logprobs))
    assert all(np.array_equal(*both) for both in zip(found, (ids, logprobs), strict=True))


def test_an_entry_of_another_size_is_refused() -> None:
    way = compression("budget")
    given = columns("budget", way)
    given["compressed_logprobs"] = given["compressed_logprobs"][:, :-1]
    with pytest.raises(
        ValueError, match="compressed_logprobs has 13 values at a position, and 14 by its settings"
    ):
        way.decode(given)


def test_settings_are_found_in_each_of_its_files(tmp_path: Path) -> None:
    file = tmp_path / "compression_config.yaml"
    plain = "d: 49152\nk: 8\nexact_k: 2\nresidual_bins: []\npolynomial_terms: [0, 1, sqrt]\n"
    legacy = "vocab_size: 49152\nk: 8\nexact_k: 2\npolynomial_degree: 3\n"
    inner = "".join(f"    {line}\n" for line in plain.splitlines())
    file.write_text(plain)
    found = read_compression(file)
    assert isinstance(found, Quantised)
    assert found.delta_encoding
    assert found.polynomial_terms == (0, 1, "sqrt")
    file.write_text(f"model: student\nteacher:\n  kind: dataset\n  logprob_compressor:\n{inner}")
    assert read_compression(file) == found
    file.write_text(legacy)
    assert isinstance(read_compression(file), LegacyPolynomial)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("polynomial_terms: [0, cos]", "polynomial_terms.1"),
        ("exact_dtype: float8", "exact_dtype"),
        ("entropy_coding: true", "entropy_coding is no setting"),
        ("exact_k: 9", "exact_k 9 is more than k 8"),
        ("polynomial_terms: []", "polynomial_terms or residual_bins are needed"),
        (
            "residual_bins: [{scale_dtype: float32, element_bits: 2, num_elements: 9}]",
            "residual_bins hold 9 values",
        ),
    ],
)
def test_a_way_that_is_not_known_is_named(tmp_path: Path, change: str, fault: str) -> None:
    file = tmp_path / "compression_config.yaml"
    settings = {"d": "100", "k": "8", "exact_k": "2", "residual_bins": "[]", "polynomial_terms": "[0, 1]"}
    name, _, value = change.partition(": ")
    settings[name] = value
    file.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    with pytest.raises(BadSettings, match=fault):
        read_compression(file)


def test_a_set_without_its_settings_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="which says how the set is compressed; give `compression`"):
        read_compression(tmp_path / "compression_config.yaml")


def test_terms_that_are_not_finite_are_not_written() -> None:
    way = Quantised(d=10, k=4, exact_k=1, polynomial_terms=(0, -1), residual_bins=())
    with pytest.raises(BadOption, match="terms that are finite"):
        way.encode(np.zeros((1, 4), np.int32), torch.zeros(1, 4).numpy())
