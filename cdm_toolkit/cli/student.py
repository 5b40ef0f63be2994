"""`cdm student`: create a student model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cdm_toolkit.cli import options

Entries = Annotated[
    int | None,
    typer.Option(
        help="Truncate the vocabulary to this many ids: the first merges (byte-level BPE only).", min=1
    ),
]

app = typer.Typer(no_args_is_help=True, help="Create a student model to train.")


@app.command()
def new(
    tokenizer: Annotated[str, typer.Option(help="Tokenizer of the student: an alias, a folder or a hub id.")],
    output: options.OutputFolder,
    size: Annotated[str, typer.Option(help="Approximate number of parameters: 10m, 135m, 1b.")] = "10m",
    entries: Entries = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Create a randomly initialised Llama-architecture model of about this size.

    Example: cdm student new --size 10m --tokenizer mistral -o student
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.hub.students import new_student

    model = new_student(tokenizer, size, Path(output), entries=entries, seed=seed, overwrite=overwrite)
    config = model.config
    screen.out().print(
        f"{output}: {model.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {config.vocab_size:,} ids of {tokenizer}",
        markup=False,
        soft_wrap=True,
    )


@app.command()
def transplant(
    source: Annotated[str, typer.Option("--from", help="The model: an alias, a folder or a hub id.")],
    tokenizer: Annotated[str, typer.Option(help="The new tokenizer: an alias, a folder or a hub id.")],
    output: options.OutputFolder,
    entries: Entries = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Give a trained model another vocabulary: new embeddings are made of the old ones, all other weights are kept.

    A token that the old vocabulary has keeps its embedding row, special tokens by their role; any other gets the mean
    of the rows of the old tokens that spell it. The remaining rows are drawn at random.

    Example: cdm student transplant --from smollm2 --tokenizer mistral -o student
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.hub.students import transplant as give

    with screen.err().status(f"{source}: moving to the vocabulary of {tokenizer}"):
        given = give(source, tokenizer, Path(output), entries=entries, seed=seed, overwrite=overwrite)
    rows = given.rows
    if as_json:
        facts = {
            "output": str(output),
            "source": source,
            "tokenizer": tokenizer,
            "parameters": given.parameters,
        }
        screen.print_json({**facts, "rows": asdict(rows)})
        return
    screen.out().print(
        f"{output}: {given.parameters / 1e6:.1f} M parameters, {given.vocab_size:,} ids of {tokenizer}: "
        f"{rows.copied:,} copied, {rows.by_role:,} by role, {rows.mean:,} means of several, {rows.fresh:,} fresh",
        markup=False,
        soft_wrap=True,
    )
