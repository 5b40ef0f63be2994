"""Small vocabularies of chosen bytes, edge cases included."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import pytest
from filelock import FileLock

from cdm_toolkit.artifacts.maps import load_table, save_table
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.tokdiff.vocabulary import SpecialToken
from cdm_toolkit.vocab_map.exact import build_exact
from cdm_toolkit.vocab_map.neighbours import build_neighbours
from cdm_toolkit.vocab_map.types import NeighbourTable, VocabMap

ToyView = Callable[..., TokenizerView]


@pytest.fixture(scope="session")
def toy_view() -> ToyView:
    """Give the function that makes a view of given bytes; special tokens are given as id: role."""

    def make(
        name: str, tokens: Sequence[bytes | None], special: Mapping[int, str | None] | None = None
    ) -> TokenizerView:
        roles = special or {}
        facts: dict[str, Any] = {
            "name": name,
            "family": "toy",
            "token_bytes": tuple(None if i in roles else data for i, data in enumerate(tokens)),
            "special": {
                i: SpecialToken(i, f"<{i}>", role, frozenset(role.split()) if role else frozenset())
                for i, role in roles.items()
            },
            "fingerprint": sha256(repr((tokens, special)).encode()).hexdigest(),
            "literals": tuple(data or b"" for data in tokens),
        }
        view = object.__new__(TokenizerView)  # mapping looks at bytes and roles only, so no backend is made
        for field, value in facts.items():
            object.__setattr__(view, field, value)
        return view

    return make


@pytest.fixture(scope="session")
def random_view(toy_view: ToyView) -> Callable[[random.Random, str, int], TokenizerView]:
    """Give the function that draws a vocabulary, dense enough that there are near tokens and many ties."""
    pieces = ["a", "b", "ab", "é", "中", "文", "1", "=", "not", "now", " ", "\n", "\u3000", "\x80"]
    halves = [b"\xe4", b"\xb8", b"\xf0\x9f", b"\xff"]

    def make(source: random.Random, name: str, size: int) -> TokenizerView:
        tokens: list[bytes | None] = [None, None]
        for _ in range(size - 2):
            text = "".join(source.choices(pieces, k=source.randint(1, 5)))
            data = text.encode() + (source.choice(halves) if source.random() < 0.15 else b"")
            tokens.append(source.choice([data, data, data, b" " + data, None]))
        return toy_view(name, tokens, {0: "bos", 1: source.choice(["eos", None])})

    return make


@pytest.fixture(scope="session")
def smollm2_to_mistral(
    smollm2_view: TokenizerView, mistral_view: TokenizerView, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VocabMap, NeighbourTable]:
    """Build what contextual selection needs for two real tokenizers, once for all processes of tests."""
    exact = build_exact(smollm2_view, mistral_view)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / "smollm2-to-mistral.safetensors"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            save_table(file, build_neighbours(smollm2_view, mistral_view, match_digits=False, workers=2))
        return exact, load_table(file, smollm2_view, mistral_view)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)
