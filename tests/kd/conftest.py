"""Small fresh models with tokenizers of their own, as a training loop has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cdm_toolkit.kd import TokenizerPair


@dataclass(frozen=True, slots=True)
class Side:
    """A model and its tokenizer, as transformers gives them."""

    model: Any
    tokenizer: Any


def _side(folder: Path) -> Side:
    from cdm_toolkit.hub.models import load_model
    from cdm_toolkit.hub.tokenizers import load_tokenizer

    return Side(load_model(str(folder)), load_tokenizer(str(folder)).tokenizer)


@pytest.fixture(scope="session")
def teacher(small_models: Path) -> Side:
    return _side(small_models / "teacher")


@pytest.fixture(scope="session")
def other(small_models: Path) -> Side:
    """Give another model with the teacher's tokenizer."""
    return _side(small_models / "other")


@pytest.fixture(scope="session")
def student(small_models: Path) -> Side:
    return _side(small_models / "student")


@pytest.fixture(scope="session")
def nested_student(small_models: Path) -> Side:
    """Give a model whose tokenizer has the first of the teacher's merges."""
    return _side(small_models / "nested")


@pytest.fixture(scope="session")
def two(teacher: Side, student: Side) -> TokenizerPair:
    """Pair two tokenizers that differ."""
    return TokenizerPair(teacher.tokenizer, student.tokenizer, names=("teacher", "student"))


@pytest.fixture(scope="session")
def same(teacher: Side, other: Side) -> TokenizerPair:
    """Pair a tokenizer with its like."""
    return TokenizerPair(teacher.tokenizer, other.tokenizer, names=("teacher", "other"))


@pytest.fixture(scope="session")
def nested(teacher: Side, nested_student: Side) -> TokenizerPair:
    """Pair a tokenizer with its first merges."""
    return TokenizerPair(teacher.tokenizer, nested_student.tokenizer, names=("teacher", "nested"))
