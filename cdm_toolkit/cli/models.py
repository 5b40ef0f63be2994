"""`cdm models`: aliases and their sources."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cdm_toolkit.cli import completion, options, screen

app = typer.Typer(no_args_is_help=True, help="List the aliases of tokenizers and models, and fetch them.")


@app.command("list")
def list_models(as_json: options.AsJson = False) -> None:
    """List each alias: its source, its licence, and whether it is available locally.

    A local folder or a hub id can be used wherever an alias can; @ and a revision may follow an alias or hub id.
    """
    from cdm_toolkit.hub.resolve import list_aliases

    statuses = list_aliases()
    if as_json:
        screen.print_json([asdict(status) for status in statuses])
        return
    kinds = ("tokenizer", "tokenizer and weights")
    screen.print_table(
        None,
        ("alias", "what", "source", "licence", "here"),
        ((s.alias, kinds[s.weights], s.source, s.licence, "yes" if s.here else "no") for s in statuses),
    )


@app.command()
def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Aliases or hub ids; @ and a revision may follow.", autocompletion=completion.models
        ),
    ],
    as_json: options.AsJson = False,
) -> None:
    """Fetch tokenizers and models into the cache, and convert them for fast loading.

    A hub id is fetched with its weights; for an alias, see cdm models list.

    Example: cdm models fetch smollm2 mistral
    """
    from cdm_toolkit.hub.models import has_weights, model_folder
    from cdm_toolkit.hub.resolve import resolve

    fetched = []
    for name in names:
        with screen.err().status(f"{name}: fetching"):
            found = resolve(name)
            folder = model_folder(name) if has_weights(name) else found.folder
        commit = {"commit": found.commit} if found.commit else {}
        fetched.append({"name": name, "origin": found.origin, **commit, "folder": str(folder)})
        came = "here already" if found.origin in ("cache", "local") else f"from the {found.origin}"
        screen.say(f"{name}: {came}, in {folder}")
    if as_json:
        screen.print_json(fetched)
