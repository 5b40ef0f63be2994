"""Options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm_toolkit.cli import completion

_T1 = typer.Option(
    "--t1",
    help="First tokenizer: an alias (cdm models list), a folder or a hub id.",
    autocompletion=completion.models,
)
_T2 = typer.Option("--t2", help="Second tokenizer, likewise.", autocompletion=completion.models)
FirstTokenizer = Annotated[str, _T1]
SecondTokenizer = Annotated[str, _T2]
FirstTokenizerIfGiven = Annotated[str | None, _T1]
SecondTokenizerIfGiven = Annotated[str | None, _T2]
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
Teacher = Annotated[
    str,
    typer.Option(
        "--t1",
        help="The teacher's tokenizer: an alias, a folder or a hub id.",
        autocompletion=completion.models,
    ),
]
Student = Annotated[
    str,
    typer.Option(
        "--t2",
        help="The student's tokenizer: an alias, a folder or a hub id.",
        autocompletion=completion.models,
    ),
]
