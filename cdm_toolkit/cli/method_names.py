"""Names of the methods for help texts, read from their class bodies: importing them brings torch (seconds)."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from cdm_toolkit.cli.settings_options import constants_in


def method_summaries() -> dict[str, str]:
    """Give the one-line summary of each method by name: those of the toolkit, then those of plugins."""
    own = sorted((Path(__file__).parents[1] / "kd").glob("*.py"))
    return dict(found for file in (*own, *_plugins()) for found in _methods_in(file))


def _plugins() -> Iterator[Path]:
    """List the files that `kd.plugins` would import."""
    for entry in entry_points(group="cdm_toolkit.methods"):
        try:
            spec = importlib.util.find_spec(entry.module)
        except (ImportError, ValueError):
            continue  # running a command tells it
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin)
    for file in filter(None, os.environ.get("CDM_METHODS", "").split(os.pathsep)):
        yield Path(file)


def _methods_in(file: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return  # running a command tells a plugin's faults, its help does not
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            texts = dict(constants_in(node.body))
            if isinstance(texts.get("name"), str) and isinstance(texts.get("summary"), str):
                yield texts["name"], texts["summary"]
