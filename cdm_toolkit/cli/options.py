"""Options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FirstTokenizer = Annotated[
    str, typer.Option("--t1", help="First tokenizer: an alias (cdm models list), a folder or a hub id.")
]
SecondTokenizer = Annotated[
    str, typer.Option("--t2", help="Second tokenizer: an alias, a folder or a hub id.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="Device of the model: cpu, cuda, cuda:1, ...")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Aligner = Annotated[str, typer.Option(help="anchored (exact), bytes, entropy-dtw (the paper's) or dtw.")]
Workers = Annotated[int, typer.Option(help="Number of worker processes.", min=1)]
Teacher = Annotated[
    str, typer.Option("--t1", help="The teacher's tokenizer: an alias, a folder or a hub id.")
]
Student = Annotated[
    str, typer.Option("--t2", help="The student's tokenizer: an alias, a folder or a hub id.")
]
