"""`cdm vocab-map`: build, look at, export."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

PAIR = ("--t1", "smollm2", "--t2", "mistral")


def test_every_format_says_the_same(cdm, tmp_path: Path, smollm2_view, mistral_view) -> None:
    for form in ("npy", "json", "csv", "parquet", "safetensors"):
        answer = cdm(
            "vocab-map", "export", *PAIR, "--strategy", "exact", "-o", tmp_path / f"map.{form}", "--json"
        )
        record = json.loads(answer.out)
        assert record["matched"] == record["entries"] > 20_000
    dense = np.load(tmp_path / "map.npy")
    assert dense.dtype == np.int64
    assert dense.shape == (smollm2_view.vocab_size,)
    pairs = {(i, int(s)) for i, s in enumerate(dense) if s >= 0}
    with (tmp_path / "map.csv").open(encoding="utf-8", newline="") as file:
        assert {(int(row["teacher_id"]), int(row["student_id"])) for row in csv.DictReader(file)} == pairs
    for teacher_id, student_id in list(pairs)[:2000]:
        data = smollm2_view.token_bytes[teacher_id]
        assert data is None or data == mistral_view.token_bytes[student_id]


def test_show_lists_both_directions(cdm) -> None:
    record = json.loads(cdm("vocab-map", "show", " tokenizer", *PAIR, "--json", "--limit", "5").out)
    assert record["exact"] is None
    assert len(record["near"]) == len(record["near_of"]) == 5
    distances = [entry["distance"] for entry in record["near"]]
    assert distances == sorted(distances)
    assert all(0 < distance < 0.3 for distance in distances)
    by_id = json.loads(cdm("vocab-map", "show", record["id"], *PAIR, "--json", "--limit", "5").out)
    assert by_id == record
    exact = json.loads(cdm("vocab-map", "show", " computer", *PAIR, "--json").out)
    assert exact["exact"] is not None
    assert exact["near"] == []


@pytest.mark.parametrize(("token", "word"), [("no such token", "' such'"), ("999999", "49151")])
def test_show_refuses_what_is_no_token(cdm, token: str, word: str) -> None:
    answer = cdm("vocab-map", "show", token, *PAIR)
    assert answer.status == 2
    assert word in answer.err


def test_stats_count_ids_classes_and_a_corpus(cdm, tmp_path: Path) -> None:
    corpus, page = tmp_path / "texts.txt", tmp_path / "stats.html"
    corpus.write_text("the computer is here\n", encoding="utf-8")
    answer = cdm(
        *("vocab-map", "stats", *PAIR, "--strategy", "exact", "--corpus", corpus, "--json", "--html", page),
    )
    record = json.loads(answer.out)
    assert record["corpus"] == {"matched": 4, "total": 4, "share": 1.0}
    assert record["classes"]["digits"]["matched"] >= 10
    assert sum(part["total"] for part in record["classes"].values()) == record["ids"]["total"] == 49_152
    content = page.read_text(encoding="utf-8")
    for label, part in record["classes"].items():
        assert f"<td>{label}</td>" in content
        assert f"{part['share']:.1%}" in content
    assert '<i data-kind="1-n" style="--share: 1.0000"></i>' in content
    assert "Of the corpus&#39;s 4 tokens 100.00% have a match." in content
    assert "--data" in cdm("vocab-map", "stats", *PAIR, "--teacher", "smollm2").err


@pytest.mark.slow
def test_stats_weigh_a_teachers_probability(cdm, tmp_path: Path) -> None:
    data = tmp_path / "rows.txt"
    data.write_text("Natalia sold 48 clips to her friends in April.\n", encoding="utf-8")
    mass = json.loads(cdm("vocab-map", "stats", *PAIR, "--teacher", "smollm2", "--data", data, "--json").out)[
        "mass"
    ]
    assert list(mass) == ["exact", "+min-ed", "+contextual", "+prefix"]
    assert 0.5 < mass["exact"] <= mass["+contextual"] <= 1.0001
    assert mass["+prefix"] >= 0.99
    other = cdm(
        "vocab-map", "stats", "--t1", "qwen2", "--t2", "mistral", "--teacher", "smollm2", "--data", data
    )
    assert other.status == 2
    assert "--t1 smollm2" in other.err
