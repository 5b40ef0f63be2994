"""Atomic creation of entries in the user's cache folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from cdm_toolkit.errors import FileProblem


def make_entry(target: Path, fill: Callable[[Path], None]) -> Path:
    """Create a folder in the cache: `fill` a temporary sibling folder, then rename it.

    A killed process leaves no partial folder; of two concurrent processes, the first wins. Raises FileProblem.
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
                if not target.is_dir():  # else another process has created it
                    raise
    except OSError as error:
        problem = f"cannot write to the cache: {error.strerror or error}"
        raise FileProblem(
            target, problem, "free space there, or set CDM_CACHE to a folder that can be written"
        ) from None
    return target
