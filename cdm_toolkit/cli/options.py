"""Options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cdm_toolkit.cli import completion


def model(about: str, *flags: str) -> Any:
    """Make the option that names a tokenizer or model; the shell completes aliases."""
    help = f"{about}: an alias (cdm models list), a folder or a hub id."
    return typer.Option(*flags, help=help, autocompletion=completion.models)


_T1, _T2 = model("First tokenizer", "--t1"), model("Second tokenizer", "--t2")
FirstTokenizer = Annotated[str, _T1]
SecondTokenizer = Annotated[str, _T2]
FirstTokenizerIfGiven = Annotated[str | None, _T1]
SecondTokenizerIfGiven = Annotated[str | None, _T2]
Teacher = Annotated[str, model("The teacher's tokenizer", "--t1")]
Student = Annotated[str, model("The student's tokenizer", "--t2")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Device = Annotated[
    str,
    typer.Option(help="Where the model runs: auto (cuda if it is here, else mps, else cpu), cpu, cuda:1, …"),
]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Aligner = Annotated[str, typer.Option(help="anchored (exact), bytes, entropy-dtw (the paper's) or dtw.")]
Workers = Annotated[int, typer.Option(help="Number of worker processes.", min=1)]
