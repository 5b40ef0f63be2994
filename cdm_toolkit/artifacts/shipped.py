"""YAML files shipped with the package: recipes, studies, suites."""

from __future__ import annotations

from pathlib import Path

import cdm_toolkit
from cdm_toolkit.errors import FileProblem


def shipped_folder(name: str) -> Path:
    """Find a folder of shipped files: inside the installed package, or at the root of a checkout."""
    package = Path(cdm_toolkit.__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def given_file(name: str) -> Path | None:
    """Return the path if a name ends in .yaml or .yml, None if it is the name of a shipped file. FileProblem."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return None
    if not path.is_file():
        raise FileProblem(path, "there is no such file")
    return path
