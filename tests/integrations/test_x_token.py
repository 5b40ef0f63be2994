"""The projection file of NeMo-RL: written, read, and refused where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdm_toolkit.errors import BadArtifact, FileProblem, TokenizerMismatch
from cdm_toolkit.integrations.x_token import read_projection, write_projection
from cdm_toolkit.kd import TokenizerPair, XToken


@pytest.fixture(scope="module")
def pair(small_models: Path) -> TokenizerPair:
    return TokenizerPair.from_names(str(small_models / "teacher"), str(small_models / "student"))


@pytest.fixture
def file(tmp_path: Path, pair: TokenizerPair) -> Path:
    write_projection(tmp_path / "w.pt", pair)
    return tmp_path / "w.pt"


def changed(file: Path, **content: Any) -> Path:
    """Write the file anew with other content, as one without fingerprints."""
    old = torch.load(file, weights_only=True)
    kept = {key: value for key, value in old.items() if not key.endswith("_fingerprint")}
    torch.save({key: value for key, value in (kept | content).items() if value is not None}, file)
    return file


def test_what_is_written_is_read(file: Path, pair: TokenizerPair) -> None:
    found, built = read_projection(file, pair), pair.projection()
    assert np.array_equal(found.ids, built.ids)
    assert np.array_equal(found.weights, built.weights)


def test_the_file_is_what_nemo_rl_reads(file: Path, pair: TokenizerPair) -> None:
    content = torch.load(file, weights_only=True)
    ids, weights = content["indices"], content["likelihoods"]
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert ids.shape == weights.shape == (pair.vocab_s, 4)
    assert ((ids >= -1) & (ids < pair.vocab_t)).all()
    assert ((ids < 0) == (weights == 0)).all()
    sums = weights.sum(-1)
    assert torch.isclose(sums[sums > 0], torch.tensor(1.0)).all()


def test_a_method_reads_it(file: Path, pair: TokenizerPair) -> None:
    own, read = XToken(pair), XToken(pair, projection=str(file))
    assert torch.equal(own.teacher_ids, read.teacher_ids)
    assert torch.equal(own.weights, read.weights)


def test_rows_of_padding_and_ids_without_weight_are_left_out(file: Path, pair: TokenizerPair) -> None:
    """NeMo-RL's tools make a row for each row of the embedding, in bfloat16, and name ids of weight 0."""
    content = torch.load(file, weights_only=True)
    ids, weights = content["indices"], content["likelihoods"].to(torch.bfloat16)
    ids = torch.cat((ids.masked_fill(ids < 0, 10**6), torch.full((8, 4), 10**6)))
    weights = torch.cat((weights, torch.ones(8, 4, dtype=torch.bfloat16)))
    found = read_projection(changed(file, indices=ids, likelihoods=weights), pair)
    assert np.array_equal(found.ids, pair.projection().ids)
    assert np.allclose(found.weights, pair.projection().weights, rtol=2**-8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"likelihoods": None}, "it holds enable_scale_trick, indices"),
        ({"indices": torch.zeros(3, 4).long()}, r"`indices` of shape \[3, 4\]"),
        (
            {"indices": torch.zeros(3, 4).long(), "likelihoods": torch.ones(3, 4)},
            "it has 3 rows, the student [0-9]+ ids",
        ),
    ],
)
def test_tables_that_do_not_fit(
    file: Path, pair: TokenizerPair, content: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadArtifact, match=message):
        read_projection(changed(file, **content), pair)


def test_ids_and_weights_that_cannot_be(file: Path, pair: TokenizerPair) -> None:
    content = torch.load(file, weights_only=True)
    ids, weights = content["indices"].clone(), content["likelihoods"].clone()
    ids[5, 0], weights[5, 0] = pair.vocab_t, 1.0
    with pytest.raises(BadArtifact, match=f"names the teacher's id {pair.vocab_t}"):
        read_projection(changed(file, indices=ids), pair)
    weights[5, 0] = torch.nan
    with pytest.raises(BadArtifact, match="not all of its weights are numbers"):
        read_projection(changed(file, likelihoods=weights), pair)


def test_a_file_of_another_pair(file: Path, pair: TokenizerPair, small_models: Path) -> None:
    swapped = TokenizerPair.from_names(str(small_models / "student"), str(small_models / "teacher"))
    with pytest.raises(TokenizerMismatch, match="write it again for this pair"):
        read_projection(file, swapped)


def test_no_file_and_no_tensors(tmp_path: Path, pair: TokenizerPair) -> None:
    with pytest.raises(FileProblem, match="No such file"):
        read_projection(tmp_path / "w.pt", pair)
    (tmp_path / "w.pt").write_text("W")
    with pytest.raises(BadArtifact, match="it is no file of tensors"):
        read_projection(tmp_path / "w.pt", pair)
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(BadArtifact, match="it holds a list"):
        read_projection(tmp_path / "w.pt", pair)
    with pytest.raises(FileProblem, match="cannot be written"):
        write_projection(tmp_path / "nowhere" / "w.pt", pair)


def test_nothing_in_a_file_is_run(tmp_path: Path, pair: TokenizerPair) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("run",)

    torch.save({"indices": Runs()}, tmp_path / "w.pt")
    with pytest.raises(BadArtifact, match="it is no file of tensors"):
        read_projection(tmp_path / "w.pt", pair)
