"""Methods that live outside the package: entry points, and files that an environment variable names."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from cdm_toolkit.errors import CdmError, FileProblem

ENTRY_POINTS = "cdm_toolkit.methods"
"""Group of entry points: importing one registers its methods."""
VARIABLE = "CDM_METHODS"
"""Environment variable: Python files with methods, separated as PATH is."""


def load_plugins() -> None:
    """Import the methods of installed packages and of the files in `CDM_METHODS`, each once.

    FileProblem for a file that is not there, CdmError for one that cannot be imported.
    """
    _load(os.environ.get(VARIABLE, ""))


@cache
def _load(files: str) -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever another package raises
            raise _broken(f"the entry point {entry.name} ({entry.value})", error) from error
    for file in filter(None, files.split(os.pathsep)):
        _import(Path(file))


@cache
def _import(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"cdm_methods_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise FileProblem(file, "there is no such Python file", f"mend the environment variable {VARIABLE}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations that are strings
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a person's own file raises
        del sys.modules[spec.name]
        raise _broken(str(file), error) from error


def _broken(where: str, error: Exception) -> CdmError:
    return CdmError(f"the methods of {where} cannot be imported", got=f"{type(error).__name__}: {error}")
