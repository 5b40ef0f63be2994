"""What the shell completes where a name is wanted, each with a line about it. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

Completions = list[tuple[str, str]]

WIDTH = 72
"""Of a line about a name: fish takes a second line for another name."""


def models() -> Completions:
    """List the aliases of tokenizers and models; folders are completed by the shell where none fits."""
    from cdm_toolkit.hub.aliases import ALIASES

    return _short((alias.name, alias.hub_id) for alias in ALIASES.values())


def methods() -> Completions:
    """List the methods of distillation, those of plugins too."""
    from cdm_toolkit.cli.method_names import method_summaries

    return _short(method_summaries().items())


def methods_or_none() -> Completions:
    """List the methods, and `sft`, which has no teacher."""
    return [*methods(), ("sft", "no teacher")]


def suites() -> Completions:
    """List the shipped suites, and `all`."""
    return [*_shipped("eval_suites"), ("all", "every suite whose data is here")]


def recipes() -> Completions:
    """List the recipes."""
    return _shipped("recipes")


def studies() -> Completions:
    """List the shipped studies."""
    return _shipped("studies")


def _shipped(folder: str) -> Completions:
    """List shipped files by name, each with its first line, which is a comment."""
    from cdm_toolkit.artifacts.shipped import shipped_folder

    root = shipped_folder(folder)
    files = sorted(root.rglob("*.yaml"))
    return _short((path.relative_to(root).with_suffix("").as_posix(), _first_line(path)) for path in files)


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as stream:
        return stream.readline().removeprefix("#").strip()


def _short(names: Iterable[tuple[str, str]]) -> Completions:
    from textwrap import shorten

    return [(name, shorten(about, WIDTH, placeholder=" …")) for name, about in names]
