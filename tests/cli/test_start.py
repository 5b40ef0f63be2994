"""What every call of `cdm` pays before it does anything."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "datasets", "lm_eval", "numba", "tokenizers", "numpy")


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        f"import sys, cdm_toolkit.cli, cdm_toolkit.cli.app; print([m for m in {HEAVY} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_help_names_every_group(cdm) -> None:
    answer = cdm("--help")
    assert answer.status == 0
    for group in (
        "align",
        "tokenizer",
        "vocab-map",
        "student",
        "distill",
        "signal",
        "eval",
        "generate",
        "models",
        "doctor",
    ):
        assert group in answer.out


def test_version(cdm) -> None:
    assert cdm("--version").out.startswith("cdm-toolkit ")
