"""`cdm student`: make a model to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm_toolkit.cli import options

app = typer.Typer(no_args_is_help=True, help="Make a model to train.")


@app.command()
def new(
    tokenizer: Annotated[str, typer.Option(help="Whose vocabulary it has: an alias, a folder or a hub id.")],
    output: options.OutputFolder,
    size: Annotated[str, typer.Option(help="Parameters, about: 10m, 135m, 1b.")] = "10m",
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a fresh Llama-architecture model of about this size, with random weights.

    Example: cdm student new --size 10m --tokenizer mistral -o student
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.hub.models import new_student

    model = new_student(tokenizer, size, Path(output), seed=seed, overwrite=overwrite)
    config = model.config
    screen.out().print(
        f"{output}: {model.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {config.vocab_size:,} ids of {tokenizer}",
        markup=False,
        soft_wrap=True,
    )
