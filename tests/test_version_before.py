"""What the version before has written (`data/before`) is read, or refused with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cdm_toolkit.artifacts.maps import load_map, load_table
from cdm_toolkit.artifacts.teacher_cache import CacheWriter, TeacherCache, read_header
from cdm_toolkit.compare.prepared import TRAINING_ROWS, open_shared
from cdm_toolkit.compare.results import put_together
from cdm_toolkit.compare.study_folder import StudyFolder
from cdm_toolkit.distill.dataset_store import AlignedDataset, open_or_make
from cdm_toolkit.distill.output_folder import check_seal, claim_output
from cdm_toolkit.errors import BadArtifact
from cdm_toolkit.evaluation.item_store import open_items
from cdm_toolkit.tokdiff.view import TokenizerView, make_view


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(__file__).parent / "data" / "before", tmp_path / "before"))


def view(name: str, words: list[str]) -> TokenizerView:
    return make_view(name, Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="?")))


def test_maps_are_read(before: Path) -> None:
    both = view("left", ["?", "one", "two", "three"]), view("right", ["?", "two", "one", "thee"])
    mapping = load_map(before / "map.safetensors", *both)
    assert (mapping.strategy, mapping.dense().tolist()) == ("exact", [0, 2, 1, -1])
    table = load_table(before / "neighbours.safetensors", *both)
    assert table.max_edit_distance == 0.3


def test_a_teacher_cache_is_read_and_gone_on_with(before: Path) -> None:
    folder = before / "teacher-cache"
    cache = TeacherCache.open(folder)
    cache.verify()
    assert cache.row(2).ids.tolist() == [[5, 6]] * 3
    assert np.exp(cache.row(2).logprobs[0]) == pytest.approx([0.5, 0.25], abs=1e-3)
    assert cache.header.code is None
    now = read_header(folder).model_copy(update={"code": "another"})
    assert CacheWriter(folder, now).state(0) == "whole"


def test_a_checkpoint_is_resumed_from(before: Path) -> None:
    checkpoint = before / "run" / "checkpoint-2"
    assert claim_output(before / "run", overwrite=False, resume=True) == checkpoint
    (checkpoint / "inner" / "state.json").write_text("[]")
    with pytest.raises(BadArtifact, match=r"its sha256 is .*; remove .* and resume from the one before"):
        check_seal(checkpoint)


def test_a_study_is_put_together(before: Path) -> None:
    folder = StudyFolder(before / "study")
    study = folder.read_study()
    result = put_together(study, folder, command="x")
    assert [each.cell.method for each in result.cells] == ["sft", "exact"]
    assert result.cells[1].scores.outside["manual"].boundaries > 0
    assert open_shared(folder).counts == {"sums": 2}
    assert TRAINING_ROWS in open_shared(folder).fingerprints
    folder.claim(study)


def test_finished_items_are_read(before: Path) -> None:
    with open_items(before / "items.jsonl", {"data": "a" * 64, "batch_size": None}) as file:
        assert [item.key for item in file.items.values()] == ["1", "2"]


def test_features_are_made_anew(before: Path) -> None:
    """They are a cache, which none but this toolkit fills."""
    folder = before / "features"
    with pytest.raises(BadArtifact, match="remove the folder; the features are then made anew"):
        AlignedDataset(folder)
    with pytest.raises(BadArtifact):
        open_or_make(folder, lambda: folder.mkdir())
    assert not list(folder.iterdir()), "the old ones are gone when new ones are made"
