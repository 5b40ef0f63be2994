"""Entries of the user's cache folder: what is fetched or converted, each whole or absent."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from cdm_toolkit.errors import FileProblem


def publish(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make a folder of the cache by filling a temporary one beside it and renaming that.

    A killed process leaves no half of it; of two processes the first wins. Raises FileProblem.
    """
    try:
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
                if not target.is_dir():  # else another process was first
                    raise
    except OSError as error:
        problem = f"cannot write to the cache: {error.strerror or error}"
        raise FileProblem(
            target, problem, "free space there, or set CDM_CACHE to a folder that can be written"
        ) from None
    return target
