"""`cdm recipes`: run files, and files for accelerate launch, that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm_toolkit.artifacts.atomic import write_whole
from cdm_toolkit.cli import completion, options, screen
from cdm_toolkit.errors import FileProblem

app = typer.Typer(no_args_is_help=True, help="Run files to start from: list, show, copy.")

Name = Annotated[
    str, typer.Argument(help="Name of a recipe (cdm recipes list).", autocompletion=completion.recipes)
]


@app.command("list")
def list_all(as_json: options.AsJson = False) -> None:
    """List the recipes, with a summary of each."""
    from cdm_toolkit.distill.recipes import list_recipes

    recipes = list_recipes()
    if as_json:
        screen.print_json([{"name": r.name, "summary": r.summary, "file": str(r.path)} for r in recipes])
        return
    screen.print_table(None, ("recipe", "what it does"), ((r.name, r.summary) for r in recipes))


@app.command()
def show(name: Name) -> None:
    """Print a recipe.

    Example: cdm recipes show small/cdm > run.yaml
    """
    from cdm_toolkit.distill.recipes import find_recipe

    text = find_recipe(name).path.read_text(encoding="utf-8")
    screen.out().print(text, markup=False, soft_wrap=True, end="")


@app.command()
def copy(
    name: Name,
    to: Annotated[
        Path | None,
        typer.Argument(help="File to write.", show_default="run.yaml, for accelerate its own name"),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Copy a recipe to a run file for cdm distill, or to a file for accelerate launch.

    Example: cdm recipes copy small/cdm run.yaml
    """
    from cdm_toolkit.distill.recipes import find_recipe

    recipe = find_recipe(name)
    to = to or Path("run.yaml" if recipe.is_run else recipe.path.name)
    if to.exists() and not overwrite:
        raise FileProblem(to, "it exists", "--overwrite replaces it, or name another file")
    write_whole(to, recipe.path.read_bytes())
    launched = f"accelerate launch --config_file {to} -m cdm_toolkit.cli distill run.yaml"
    screen.line(f"{to}: edit it, then run it with: {f'cdm distill {to}' if recipe.is_run else launched}")
