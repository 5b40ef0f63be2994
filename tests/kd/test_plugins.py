"""Methods that live outside the package, and what the package does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cdm_toolkit.errors import CdmError, FileProblem
from cdm_toolkit.kd import methods
from cdm_toolkit.kd.plugins import VARIABLE

PLUGIN = '''
"""Half of the L1 distance."""

from dataclasses import dataclass

from cdm_toolkit.kd import ULD, setting
from cdm_toolkit.kd.uld import ULDSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfSettings(ULDSettings):
    share: float = setting(0.5, "Of the distance.", above=0)


class Half(ULD):
    name = "half-uld"
    summary = "half of it"
    source = "a test"
    Settings = HalfSettings
'''
USE = """
from cdm_toolkit import kd
from cdm_toolkit.distill.settings import from_mapping

half = kd.find_method("half_uld")
assert issubclass(half, kd.ULD) and list(kd.methods()).index("half-uld") < list(kd.methods()).index("kl")
teacher = {"model": "t", "method": "half-uld", "share": "0.25"}
config = from_mapping({"student": "s", "data": "d", "output": "o", "teachers": [teacher]})
print(half.summary, config.teachers[0].method_settings.share)
"""
CHECK = """
import sys
import cdm_toolkit.kd
heavy = ["transformers", "pydantic", "datasets", "tokenizers", "pyarrow"]
print([name for name in heavy if name in sys.modules])
"""


def python(code: str, **environment: str) -> str:
    """Run code in a process of its own; gives what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_method_in_a_file_is_known_to_runs(tmp_path: Path) -> None:
    file, other = tmp_path / "half.py", tmp_path / "nothing.py"
    file.write_text(PLUGIN)
    other.write_text("")
    assert python(USE, **{VARIABLE: os.pathsep.join(map(str, (other, file)))}) == "half of it 0.25"


def test_a_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.py"))
    with pytest.raises(FileProblem) as caught:
        methods()
    assert str(caught.value) == (
        f"{tmp_path / 'none.py'}: there is no such Python file; mend the environment variable {VARIABLE}"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def (", "SyntaxError: "),
        ("raise ValueError('a\\nb')", "ValueError: a b"),
    ],
)
def test_a_broken_file_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, problem: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(content)
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(CdmError) as caught:
        methods()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"the methods of {file} cannot be imported, {problem}")


def test_losses_bring_no_loader_of_models_or_settings() -> None:
    """Of the whole toolkit a training loop that takes a loss needs torch and NumPy."""
    assert python(CHECK) == "[]"
