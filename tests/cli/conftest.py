"""Run commands in this process, as the script does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest

from cdm_toolkit.cli import main


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command left behind."""

    status: int
    out: str
    err: str


Cdm = Callable[..., Answer]


@pytest.fixture
def cdm(capsys: pytest.CaptureFixture[str]) -> Cdm:
    """Give the function that runs `cdm` with arguments."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True, scope="session")
def _views_are_loaded_once() -> Iterator[None]:
    """Keep what a command would read from disk anew: a hundred commands share a handful of tokenizers."""
    from cdm_toolkit.hub import tokenizers

    read = tokenizers._view
    tokenizers._view = cache(read)
    yield
    tokenizers._view = read
