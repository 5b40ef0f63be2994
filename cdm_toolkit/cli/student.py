"""`cdm student`: create a student model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cdm_toolkit.cli import options, screen
from cdm_toolkit.errors import BadOption

if TYPE_CHECKING:
    from cdm_toolkit.hub.students import Transplanted

Entries = Annotated[
    int | None,
    typer.Option(
        help="Truncate the vocabulary to this many ids: the first merges (byte-level BPE only).", min=1
    ),
]

app = typer.Typer(no_args_is_help=True, help="Create a student model to train.")


@app.command()
def new(
    tokenizer: Annotated[str, options.model("Tokenizer of the student")],
    output: options.OutputFolder,
    size: Annotated[str, typer.Option(help="Approximate number of parameters: 10m, 135m, 1b.")] = "10m",
    entries: Entries = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Create a randomly initialised Llama-architecture model of about this size.

    Example: cdm student new --size 10m --tokenizer mistral -o student
    """
    from cdm_toolkit.hub.students import new_student

    model = new_student(tokenizer, size, Path(output), entries=entries, seed=seed, overwrite=overwrite)
    config = model.config
    screen.line(
        f"{output}: {model.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {config.vocab_size:,} ids of {tokenizer}"
    )


@app.command()
def transplant(
    source: Annotated[str, options.model("The model", "--from")],
    output: options.OutputFolder,
    tokenizer: Annotated[
        str | None, options.model("The new tokenizer, the donor's or the model's own if left out")
    ] = None,
    entries: Entries = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Keep so many layers, those that change hidden states on --data most."),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Text to measure the model on: JSONL, sample:train or sample:heldout.")
    ] = "sample:train",
    embeddings: Annotated[
        Literal["mean", "omp"],
        typer.Option(help="Rows of new tokens: means of old rows, or combinations of them after a --donor."),
    ] = "mean",
    donor: Annotated[str | None, options.model("A trained model with the new vocabulary")] = None,
    k: Annotated[int, typer.Option(help="Old rows that omp combines to a new one.", min=1)] = 64,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Give a trained model another vocabulary, fewer layers, or both; all other weights are kept.

    A token that the old vocabulary has keeps its embedding row, special tokens by their role; any other gets the mean
    of the rows of the old tokens that spell it, made e times less likely for each after the first. The remaining rows
    are drawn at random. With --embeddings omp (arXiv 2506.06607), a donor's row is written as a combination of its rows
    of shared tokens, and made again of the model's own rows of these.

    Layers are left out by their block influence (ShortGPT, arXiv 2403.03853), least first, measured before the
    vocabulary changes.

    Example: cdm student transplant --from smollm2 --tokenizer mistral --layers 20 -o student
    """
    from cdm_toolkit.distill.sources import read_rows
    from cdm_toolkit.hub.omp import Donor
    from cdm_toolkit.hub.students import transplant as give

    if (embeddings == "omp") != (donor is not None):
        raise BadOption("embeddings", embeddings, "omp together with `donor`, or neither")

    named = tokenizer or donor or source
    texts = [row.text for row in read_rows(data)]
    with screen.err().status(f"{source}: making the student"):
        given = give(
            source,
            tokenizer,
            Path(output),
            entries=entries,
            layers=layers,
            texts=texts,
            donor=None if donor is None else Donor(donor, k),
            seed=seed,
            overwrite=overwrite,
        )
    if as_json:
        screen.print_json(
            {
                "output": str(output),
                "source": source,
                "tokenizer": named,
                "parameters": given.parameters,
                "rows": given.rows and asdict(given.rows),
                "layers": given.pruned and asdict(given.pruned),
            }
        )
        return
    screen.line(
        f"{output}: {given.parameters / 1e6:.1f} M parameters, {given.vocab_size:,} ids of {named}"
        + "".join(_changes(given))
    )


def _changes(given: Transplanted) -> Iterator[str]:
    """Say how embedding rows were made, and which layers were left out."""
    if (rows := given.rows) is not None:
        yield (
            f": {rows.copied:,} copied, {rows.by_role:,} by role, {rows.mean:,} means of several, "
            f"{rows.fresh:,} fresh" + (f", {rows.omp:,} by omp" if rows.omp else "")
        )
    if (pruned := given.pruned) is not None:
        removed = ", ".join(f"{i} ({pruned.influence[i]:.3f})" for i in pruned.removed)
        yield (
            f"; {len(pruned.kept)} of {len(pruned.influence)} layers, without those of least influence: {removed}"
        )
