"""The README is true: its commands exist, its file tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path

from cdm_toolkit.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_exist(capsys) -> None:
    named = set(re.findall(r"^cdm ([a-z-]+(?: [a-z]+)?)", README, flags=re.MULTILINE))
    for cell in re.findall(r"^\| `cdm ([^|]+)\|", README, flags=re.MULTILINE):
        first, *others = [word.strip(" `").removeprefix("cdm ") for word in cell.split(",")]
        group, *sub = first.split()
        named |= {first, *(f"{group} {other}" if sub else other for other in others)}
    assert len(named) > 15
    for command in named:
        words = [word for word in command.split() if not word.startswith("-")]
        assert main([*words, "--help"]) == 0, command
        assert "Usage: cdm " + " ".join(words) in capsys.readouterr().out, command


def test_the_options_of_the_examples_exist(capsys) -> None:
    for line in re.findall(r"^cdm .+--.+$", README, flags=re.MULTILINE):
        words = re.match(r"cdm ((?:[a-z-]+ )+?)(?=--|\")", line)
        assert words, line
        assert main([*words[1].split(), "--help"]) == 0
        shown = capsys.readouterr().out
        for option in re.findall(r"--[a-z0-9-]+", line):
            assert option in shown, (line, option)


def test_the_tree_is_the_tree() -> None:
    tree = re.search(r"```\n(cdm_toolkit/\n.+?)```", README, flags=re.DOTALL)
    assert tree
    folder = ROOT
    for line in tree[1].splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ROOT
        assert (folder / name).exists(), name
        if not line.startswith(" "):
            folder = ROOT / name
    listed = {line.split()[0].rstrip("/") for line in tree[1].splitlines() if line.startswith(" ")}
    there = {
        path.name for path in (ROOT / "cdm_toolkit").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert there <= listed
