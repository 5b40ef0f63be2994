"""A corpus that a person names: rows of a JSONL file, or lines of a text file."""

from __future__ import annotations

from pathlib import Path


def read_corpus(file: Path) -> list[str]:
    """Read the texts of a corpus: the rows of a JSONL file, else the lines of a text file."""
    from cdm_toolkit.distill.sources import read_rows
    from cdm_toolkit.errors import FileProblem

    if file.suffix in (".jsonl", ".json"):
        return [row.text for row in read_rows(file)]
    try:
        content = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileProblem(file, f"is not UTF-8 (byte {error.start})", "save it as UTF-8") from None
    lines = content.removesuffix("\n").split("\n")
    if not any(lines):
        raise FileProblem(file, "is empty", "give a file with one text a line")
    return lines
