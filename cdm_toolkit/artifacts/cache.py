"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: $CDM_CACHE, else ~/.cache/cdm-toolkit (or under $XDG_CACHE_HOME)."""
    if chosen := os.environ.get("CDM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cdm-toolkit"
