"""What the shell is given to complete: names where a name is wanted, as each shell asks for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cdm_toolkit.artifacts.shipped import shipped_folder
from cdm_toolkit.cli import completion, main
from cdm_toolkit.cli.app import app
from cdm_toolkit.compare.study import list_studies
from cdm_toolkit.distill.recipes import list_recipes
from cdm_toolkit.evaluation.suites import ALL, suite_names
from cdm_toolkit.hub.aliases import ALIASES
from cdm_toolkit.kd import methods


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Give the function that completes the last word of a command line, as bash asks for it."""

    def offered(line: str) -> list[str]:
        monkeypatch.setenv("_CDM_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out.split()

    return offered


def test_all_names_are_offered() -> None:
    assert [name for name, _ in completion.models()] == list(ALIASES)
    assert {name for name, _ in completion.methods()} == set(methods())
    assert {name for name, _ in completion.suites()} == {*suite_names(), ALL}
    assert [name for name, _ in completion.recipes()] == [recipe.name for recipe in list_recipes()]
    assert [name for name, _ in completion.studies()] == list(list_studies())
    assert all(0 < len(about) <= completion.WIDTH for kind in KINDS for _, about in kind())


KINDS = (completion.models, completion.methods, completion.suites, completion.recipes, completion.studies)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cdm align show --t1 sm", ["smollm2"]),
        ("cdm align show text --t1 gpt2 --t2 m", ["mistral"]),
        ("cdm tokenizer diff gpt2 q", ["qwen2"]),
        ("cdm student transplant --from sm", ["smollm2"]),
        ("cdm distill --method s", ["sampled-reverse-kl", "simct", "spelling", "sft"]),
        ("cdm distill --teacher sm", ["smollm2"]),
        ("cdm distill small/t", ["small/transplant", "small/two-teachers"]),
        ("cdm recipes copy paper/two", ["paper/two-teachers"]),
        ("cdm signal show --method sp", ["spelling"]),
        ("cdm eval --suite pr", ["prose"]),
        ("cdm eval --suite math --model gp", ["gpt2"]),
        ("cdm compare transfer-e", ["transfer-epoch-mistral", "transfer-epoch"]),
        ("cdm models fetch gpt2 ph", ["phi3"]),
        ("cdm vocab", ["vocab-map"]),
        ("cdm distill --teacher-c", ["--teacher-cache"]),
        ("cdm generate prompt --model ./out", []),  # the shell completes the folder
    ],
)
def test_the_last_word_is_completed(complete: Any, line: str, offered: list[str]) -> None:
    assert complete(line) == offered


def test_methods_of_plugins_are_offered(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text('class Mine:\n    name = "my-method"\n    summary = "mine"\n', encoding="utf-8")
    monkeypatch.setenv("CDM_METHODS", str(file))
    assert complete("cdm distill --method my") == ["my-method"]


def parameters(command: Any) -> Iterator[Any]:
    yield from command.params
    for inner in getattr(command, "commands", {}).values():
        yield from parameters(inner)


def test_whatever_takes_an_alias_completes_it() -> None:
    named = [p for p in parameters(typer.main.get_command(app)) if "alias" in (p.help or "").lower()]
    assert len(named) > 20
    assert [p.name for p in named if p._custom_shell_complete is None] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_asks_cdm(shell: str) -> None:
    script = subprocess.run(
        [sys.executable, "-m", "cdm_toolkit.cli"],
        env=os.environ | {"_CDM_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_CDM_COMPLETE=complete_" in script.stdout


def test_completing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cdm_toolkit.cli import completion as c\n"
        "for kind in (c.models, c.methods, c.suites, c.recipes, c.studies): kind()\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_shipped_files_begin_with_what_they_are() -> None:
    for folder in ("recipes", "studies", "eval_suites"):
        for path in shipped_folder(folder).rglob("*.yaml"):
            assert path.read_text(encoding="utf-8").startswith("# "), path
