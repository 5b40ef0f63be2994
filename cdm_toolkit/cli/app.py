"""The root command `cdm` and its command groups."""

from __future__ import annotations

from typing import Annotated

import typer

from cdm_toolkit import __version__
from cdm_toolkit.cli import (
    align,
    compare,
    distill,
    doctor,
    evaluate,
    generate,
    models,
    recipes,
    signal,
    student,
    teacher,
    tokenizer,
    vocab_map,
)

app = typer.Typer(
    name="cdm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distill one language model into another that has a different tokenizer, and see how it is done.",
)
app.add_typer(align.app, name="align")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(vocab_map.app, name="vocab-map")
app.add_typer(student.app, name="student")
app.add_typer(teacher.app, name="teacher")
app.command(name="distill", cls=distill.DistillCommand)(distill.distill)
app.add_typer(signal.app, name="signal")
app.add_typer(recipes.app, name="recipes")
app.add_typer(evaluate.app, name="eval")
app.command(name="compare")(compare.compare)
app.command(name="generate")(generate.generate)
app.add_typer(models.app, name="models")
app.command(name="doctor")(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"cdm-toolkit {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Distill one language model into another that has a different tokenizer, and see how it is done."""
