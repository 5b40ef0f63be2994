"""Two small families of tokenizers, with fresh models, in place of real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cdm_toolkit.distill.settings import DistillConfig, from_mapping

WORDS = ["the", "a", "cat", "dog", "sits", "on", "mat", "runs", "over", "hill", "then", "it", "sleeps", "in"]


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Make sentences of few words, so that small vocabularies have whole words."""
    import random

    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) + "." for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Tiny:
    """Folders of two fresh models whose tokenizers differ in kind, and a file of rows."""

    teacher: str
    student: str
    data: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Make a teacher, a student and 24 rows."""
    from cdm_toolkit.hub.tiny_models import new_tiny_pair

    root = tmp_path_factory.mktemp("tiny")
    texts = sentences(300)
    pair = new_tiny_pair(texts, root)
    rows = [{"prompt": a, "completion": b} for a, b in zip(texts[:24], texts[24:48], strict=True)]
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Tiny(pair.teacher, pair.student, str(data))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory, cache_in: Callable[[Path], Path]) -> Path:
    return cache_in(tmp_path_factory.mktemp("distill") / "cache")


@pytest.fixture(autouse=True, scope="module")
def own_cache(shared_cache: Path) -> Iterator[None]:
    """Keep the tables of tiny tokenizers out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDM_CACHE", str(shared_cache))
        yield


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Name a file to write rows to."""
    return tmp_path / "rows.jsonl"


def merged(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Lay a mapping over another, mapping by mapping."""
    inner = {
        name: merged(one[name], value)
        for name, value in two.items()
        if isinstance(value, dict) and name in one
    }
    return one | two | inner


@pytest.fixture
def config(tiny, tmp_path: Path):
    """Give the function that makes a config of a short run."""

    def make(settings: dict[str, Any] | None = None, **train: Any) -> DistillConfig:
        chosen: dict[str, Any] = {
            "student": tiny.student,
            "data": {"path": tiny.data},
            "output": str(tmp_path / "out"),
            "teachers": [{"model": tiny.teacher, "top_k": 40}],
            "train": {"batch_size": 4, "max_steps": 4, "lr": 3e-3, "log_every": 1, "device": "cpu"} | train,
        }
        return from_mapping(merged(chosen, settings or {}))

    return make
