from __future__ import annotations

from collections.abc import Callable

import pytest

from cdm_toolkit.errors import SourceNotFound
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer


@pytest.fixture(scope="session")
def loaded() -> Callable[[str], Loaded]:
    """Give the function that loads a tokenizer once, and skips where it is out of reach."""
    kept: dict[str, Loaded] = {}

    def load(name: str) -> Loaded:
        try:
            return kept.setdefault(name, kept.get(name) or load_tokenizer(name))
        except SourceNotFound as error:
            pytest.skip(str(error))

    return load
