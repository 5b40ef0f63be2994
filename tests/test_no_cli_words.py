"""The library speaks Python: only `cdm_toolkit/cli` spells options and commands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import cdm_toolkit

ROOT = Path(cdm_toolkit.__file__).parent
NOT_OURS = {
    "cli": "the terminal's own words",
    "compare/study_page.py": "its style sheet has custom properties",
    "hub/wheels.py": "it starts pip, whose options these are",
    "teachers/engines.py": "it names the option of a server",
}
"""Packages and files that may spell options, with the reason."""

TERMINAL = re.compile(
    r"(^|[\s(])--[a-z]"
    r"|\bcdm (align|tokenizer|vocab-map|student|teacher|distill|signal|compare|recipes|eval|generate|models|doctor)\b"
)


def _strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield a module's strings, f-string parts too, without the docstrings of anything."""
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


def test_no_string_outside_cli_spells_an_option_or_a_command() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in sorted(ROOT.rglob("*.py"))
        if not any(path.is_relative_to(ROOT / place) for place in NOT_OURS)
        for node in _strings(ast.parse(path.read_text(encoding="utf-8")))
        if TERMINAL.search(node.value)
    ]
    assert found == []
