"""Run files that come with the package: to run as they are, or to copy and edit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cdm_toolkit
from cdm_toolkit.errors import FileProblem, UnknownName


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run file with what its first comment says of it."""

    name: str
    path: Path
    summary: str


def recipes_folder() -> Path:
    """Find the run files: inside the installed package, or at the top of a checkout."""
    package = Path(cdm_toolkit.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> list[Recipe]:
    """List the recipes; each begins with a comment that says what it is."""
    folder = recipes_folder()
    return [
        Recipe(
            path.relative_to(folder).with_suffix("").as_posix(),
            path,
            path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip(),
        )
        for path in sorted(folder.rglob("*.yaml"))
    ]


def find_recipe(name: str) -> Recipe:
    """Find a recipe by its name. Raises UnknownName."""
    found = {recipe.name: recipe for recipe in list_recipes()}
    if name not in found:
        raise UnknownName("recipe", name, list(found))
    return found[name]


def find_run_file(name: str) -> Path:
    """Find a run file by its path, or a recipe by its name. Raises FileProblem or UnknownName."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileProblem(path, "there is no such file")
        return path
    return find_recipe(name).path
