"""Run files that come with the package, and files for `accelerate launch`: to use as they are, or to copy and edit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cdm_toolkit.artifacts.shipped import given_file, shipped_folder
from cdm_toolkit.errors import UnknownName


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run file, or a file for `accelerate launch`, with its summary, which is its first comment."""

    name: str
    path: Path
    summary: str

    @property
    def is_run(self) -> bool:
        """Whether it is a run file."""
        return not self.name.startswith("accelerate/")


def list_recipes() -> list[Recipe]:
    """List the recipes; each begins with a comment that says what it is."""
    folder = shipped_folder("recipes")
    return [
        Recipe(
            path.relative_to(folder).with_suffix("").as_posix(),
            path,
            path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip(),
        )
        for path in sorted(folder.rglob("*.yaml"))
    ]


def find_recipe(name: str, *, to_run: bool = False) -> Recipe:
    """Find a recipe by its name, among all or among run files. Raises UnknownName."""
    found = {recipe.name: recipe for recipe in list_recipes() if recipe.is_run or not to_run}
    if name not in found:
        raise UnknownName("recipe", name, list(found))
    return found[name]


def find_run_file(name: str) -> Path:
    """Find a run file by its path, or a recipe by its name. Raises FileProblem or UnknownName."""
    return given_file(name) or find_recipe(name, to_run=True).path
