from __future__ import annotations

import csv
import json
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from cdm_toolkit.artifacts import maps
from cdm_toolkit.artifacts.exports import FILE_FORMATS, export_map
from cdm_toolkit.artifacts.maps import (
    cached_table,
    load_map,
    load_or_build_neighbours,
    load_table,
    save_map,
    save_table,
)
from cdm_toolkit.errors import BadArtifact, FileProblem, MissingExtra, TokenizerMismatch, UnknownName
from cdm_toolkit.vocab_map.contextual_map import build_contextual_map
from cdm_toolkit.vocab_map.exact import build_exact
from cdm_toolkit.vocab_map.types import Neighbours, NeighbourTable, VocabMap, pair_info_of


@pytest.fixture(scope="module")
def exact(smollm2_view, mistral_view) -> VocabMap:
    return build_exact(smollm2_view, mistral_view)


@pytest.fixture(scope="module")
def table(exact) -> NeighbourTable:
    """Make a small table of these tokenizers, with neighbours that nothing checks."""
    open_t = np.flatnonzero(~exact.matched)[:3]
    counts = np.zeros(exact.size_t, np.int64)
    counts[open_t] = [2, 1, 2]
    t_to_s = Neighbours(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        np.array([300, 400, 500, 600, 700], np.int32),
        np.array([0.1, 0.2, 0.25, 0.1, 0.1], np.float32),
        np.array([0, 2, 4, 0, 1], np.int32),
    )
    none = np.zeros(0, np.int32)
    s_to_t = Neighbours(np.zeros(exact.size_s + 1, np.int64), none, np.zeros(0, np.float32), none)
    return NeighbourTable(
        **pair_info_of(exact), max_edit_distance=0.3, match_digits=True, t_to_s=t_to_s, s_to_t=s_to_t
    )


@pytest.fixture(scope="module")
def mapping(exact, table) -> VocabMap:
    return build_contextual_map(exact, table)


def _same(a, b) -> bool:
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        for field in fields(a)
        if not isinstance(getattr(a, field.name), Neighbours)
    )


def test_a_map_comes_back_as_it_was(mapping, smollm2_view, mistral_view, tmp_path):
    save_map(tmp_path / "m.safetensors", mapping)
    again = load_map(tmp_path / "m.safetensors", smollm2_view, mistral_view)
    assert _same(again, mapping)
    assert (again.max_edit_distance, again.match_digits, again.strategy) == (0.3, True, "contextual")


def test_a_table_comes_back_as_it_was(table, smollm2_view, mistral_view, tmp_path):
    save_table(tmp_path / "t.safetensors", table)
    again = load_table(tmp_path / "t.safetensors", smollm2_view, mistral_view)
    assert _same(again, table)
    assert _same(again.t_to_s, table.t_to_s)
    assert _same(again.s_to_t, table.s_to_t)


def test_the_header_says_what_it_is_and_how_it_was_made(mapping, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    monkeypatch.setattr("sys.argv", ["cdm", "vocab-map", "build"])
    save_map(path, mapping)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    facts = json.loads(header["__metadata__"]["cdm_toolkit"])
    assert (facts["format"], facts["version"]) == (maps.MAP.name, maps.MAP.version)
    assert (facts["name_t"], facts["fingerprint_t"]) == ("smollm2", mapping.fingerprint_t)
    assert facts["counts"] == {"matched": int(mapping.matched.sum()), "entries": len(mapping.ids)}
    assert facts["provenance"]["command"] == "cdm vocab-map build"


def test_other_tokenizers_are_refused_with_the_command_to_rebuild(
    mapping, smollm2_view, mistral_view, tmp_path
):
    path = tmp_path / "m.safetensors"
    save_map(path, mapping)
    with pytest.raises(TokenizerMismatch) as caught:
        load_map(path, smollm2_view, smollm2_view)
    assert "was built for mistral (" in str(caught.value)
    assert "as student, the student given is smollm2" in str(caught.value)
    assert str(caught.value).endswith("`build_neighbours(load_view('smollm2'), load_view('smollm2'))`")
    with pytest.raises(TokenizerMismatch, match="as teacher"):
        load_map(path, mistral_view, smollm2_view)


@pytest.mark.parametrize("keep", [0, 5, 200, 10_000, -1])
def test_a_truncated_file_is_refused(keep, mapping, smollm2_view, mistral_view, tmp_path):
    path = tmp_path / "m.safetensors"
    save_map(path, mapping)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadArtifact, match=r"damaged.*; write it again with `export_map`"):
        load_map(path, smollm2_view, mistral_view)


def test_a_flipped_bit_is_noticed(mapping, smollm2_view, mistral_view, tmp_path):
    path = tmp_path / "m.safetensors"
    save_map(path, mapping)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadArtifact, match="its checksum is wrong"):
        load_map(path, smollm2_view, mistral_view)


def _header_of(mapping, **changes):
    header = {**maps.map_header(mapping), **changes}
    return {maps.HEADER: json.dumps(header)}


def test_foreign_files_and_other_versions_are_refused(mapping, table, smollm2_view, mistral_view, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(BadArtifact, match="no cdm-toolkit vocabulary mapping file"):
        load_map(path, smollm2_view, mistral_view)
    save_table(path, table)
    with pytest.raises(BadArtifact, match="no cdm-toolkit vocabulary mapping file"):
        load_map(path, smollm2_view, mistral_view)
    save_file({"ids": mapping.ids}, path, _header_of(mapping, version=99))
    with pytest.raises(BadArtifact, match="it has format version 99, this tool reads 2"):
        load_map(path, smollm2_view, mistral_view)
    arrays = {"ids": mapping.ids}
    save_file(arrays, path, _header_of(mapping, checksum=maps._checksum(arrays)))
    with pytest.raises(BadArtifact, match="its contents are not complete"):
        load_map(path, smollm2_view, mistral_view)
    path.write_text("no safetensors at all")
    with pytest.raises(BadArtifact, match="damaged or no safetensors file"):
        load_map(path, smollm2_view, mistral_view)
    with pytest.raises(FileProblem, match="there is no such file"):
        load_map(tmp_path / "absent", smollm2_view, mistral_view)


def test_an_unwritable_path_leaves_nothing(mapping, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileProblem, match="cannot be written"):
        save_map(tmp_path / "file" / "m.safetensors", mapping)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_json_has_explicit_ids(mapping, smollm2_view, mistral_view, tmp_path):
    path = tmp_path / "m.json"
    assert export_map(path, mapping, smollm2_view, mistral_view, file_format="json") == [path]
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["fingerprint_s"] == mapping.fingerprint_s
    assert read["provenance"]["versions"]["cdm-toolkit"]
    assert len(read["pairs"]) == len(mapping.ids)
    # The order of the pairs says nothing: the ids do.
    back = {(pair["teacher_id"], pair["student_id"]) for pair in reversed(read["pairs"])}
    assert back == {(t, s) for t in range(mapping.size_t) for s, _ in mapping.row(t)}
    the = next(pair for pair in read["pairs"] if pair["teacher_token"] == " the")
    assert (the["student_token"], the["weight"]) == (" the", 1.0)


def test_csv_and_parquet_hold_the_same_rows(mapping, smollm2_view, mistral_view, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    written = export_map(tmp_path / "m.csv", mapping, smollm2_view, mistral_view, file_format="csv")
    assert [path.name for path in written] == ["m.csv", "m.csv.header.json"]
    assert json.loads(written[1].read_text(encoding="utf-8"))["strategy"] == "contextual"
    with written[0].open(encoding="utf-8", newline="") as file:
        rows = [(int(t), a, int(s), b, float(w)) for t, a, s, b, w in list(csv.reader(file))[1:]]
    export_map(tmp_path / "m.parquet", mapping, smollm2_view, mistral_view, file_format="parquet")
    read = pq.read_table(tmp_path / "m.parquet")
    assert json.loads(read.schema.metadata[b"cdm_toolkit"])["name_t"] == "smollm2"
    columns = [column.to_pylist() for column in read.columns]
    assert [row[:4] for row in zip(*columns, strict=True)] == [row[:4] for row in rows]
    assert columns[4] == pytest.approx([row[4] for row in rows])
    assert len(rows) == len(mapping.ids)


def test_npy_is_the_dense_vector(mapping, smollm2_view, mistral_view, tmp_path):
    export_map(tmp_path / "m.npy", mapping, smollm2_view, mistral_view, file_format="npy")
    dense = np.load(tmp_path / "m.npy")
    assert dense.dtype == np.int64
    assert dense.shape == (smollm2_view.vocab_size,)
    for token_id in (0, 100, 5000, int(np.flatnonzero(~mapping.matched)[0])):
        assert dense[token_id] == next((student for student, _ in mapping.row(token_id)), -1)


def test_an_empty_map_can_be_exported(mapping, smollm2_view, mistral_view, tmp_path):
    bounds = np.zeros(mapping.size_t + 1, np.int64)
    empty = replace(mapping, indptr=bounds, ids=mapping.ids[:0], weights=mapping.weights[:0])
    for file_format in FILE_FORMATS:
        export_map(tmp_path / f"m.{file_format}", empty, smollm2_view, mistral_view, file_format=file_format)
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["pairs"] == []
    assert load_map(tmp_path / "m.safetensors", smollm2_view, mistral_view).coverage == 0


def test_unknown_formats_and_a_missing_pyarrow_are_said(
    mapping, smollm2_view, mistral_view, tmp_path, monkeypatch
):
    with pytest.raises(UnknownName, match=r"unknown format 'jsn'; did you mean json\?"):
        export_map(tmp_path / "m", mapping, smollm2_view, mistral_view, file_format="jsn")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install \"cdm-toolkit\[export\]\""):
        export_map(tmp_path / "m", mapping, smollm2_view, mistral_view, file_format="parquet")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_keyed_and_mends_itself(table, smollm2_view, mistral_view, tmp_path, monkeypatch):
    built = []

    def build(view_t, view_s, *, max_edit_distance, match_digits, workers, progress):
        built.append((max_edit_distance, match_digits, workers))
        return replace(table, max_edit_distance=max_edit_distance, match_digits=match_digits)

    monkeypatch.setattr("cdm_toolkit.vocab_map.neighbours.build_neighbours", build)
    monkeypatch.setenv("CDM_CACHE", str(tmp_path / "cache"))

    def load(**options):
        return load_or_build_neighbours(smollm2_view, mistral_view, **options)

    assert _same(load(max_edit_distance=0.3, workers=2), load(max_edit_distance=0.3))
    assert built == [(0.3, True, 2)]
    load(max_edit_distance=0.2)
    load(max_edit_distance=0.3, match_digits=False)
    assert built[1:] == [(0.2, True, 1), (0.3, False, 1)]
    path = cached_table(smollm2_view, mistral_view, max_edit_distance=0.3, match_digits=True)
    path.write_bytes(path.read_bytes()[:300])
    load(max_edit_distance=0.3)
    load(max_edit_distance=0.3)
    assert built[3:] == [(0.3, True, 1)]
    assert path != cached_table(mistral_view, smollm2_view, max_edit_distance=0.3, match_digits=True)


def test_a_cache_that_cannot_be_written_is_said(table, smollm2_view, mistral_view, tmp_path, monkeypatch):
    monkeypatch.setattr("cdm_toolkit.vocab_map.neighbours.build_neighbours", lambda *_, **__: table)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CDM_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileProblem, match="set CDM_CACHE to a folder that can be written"):
        load_or_build_neighbours(smollm2_view, mistral_view, max_edit_distance=0.3)
