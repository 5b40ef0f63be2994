"""Atomic creation of entries in the user's cache folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cdm_toolkit.artifacts.lock import locked
from cdm_toolkit.errors import FileProblem

LOCK = ".lock"


def make_entry(target: Path, fill: Callable[[Path], None]) -> Path:
    """Create a folder in the cache: `fill` a temporary sibling folder, then rename it.

    A killed process leaves no partial folder; of two concurrent processes, the first wins. Raises FileProblem.
    """
    with _cache_problems(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".making-", dir=target.parent, ignore_cleanup_errors=True
        ) as work:
            made = Path(work) / target.name
            made.mkdir()
            fill(made)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # else another process has created it
                    raise
    return target


@contextmanager
def resumed_entry(target: Path) -> Iterator[Path | None]:
    """Give a folder to fill, with what a process that was stopped has left in it; afterwards it is the entry.

    One process fills it and others wait; None for one that finds the entry there. What is in it stays when the block
    raises, for the next process to go on from. Raises FileProblem.
    """
    making = target.with_name(f".making-{target.name}")
    with _cache_problems(target), locked(making / LOCK, lambda: None):
        try:
            if target.is_dir():
                yield None
                return
            yield making
            making.rename(target)
        finally:
            if making.is_dir() and {file.name for file in making.iterdir()} <= {LOCK}:
                shutil.rmtree(making)


@contextmanager
def _cache_problems(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot write to the cache: {error.strerror or error}"
        raise FileProblem(
            target, problem, "free space there, or set CDM_CACHE to a folder that can be written"
        ) from None
