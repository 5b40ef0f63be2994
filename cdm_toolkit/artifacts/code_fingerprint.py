"""Hashes of this package's own source code, for what is made by it and kept."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@cache
def code_fingerprint(*parts: str) -> str:
    """Hash the sources of parts of the package, such as `alignment` or `kd/chat_template.py`: names and contents.

    What is kept under a name with this hash in it is made anew when the code that makes it changes.
    """
    digest = hashlib.sha256()
    for part in parts:
        path = PACKAGE / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(PACKAGE).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()
