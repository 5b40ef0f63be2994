"""Alignments of a corpus as one table, a row per text, for other tools and for analysis."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cdm_toolkit.alignment.aligners import TextAlignment
from cdm_toolkit.artifacts.atomic import atomic_folder
from cdm_toolkit.artifacts.manifest import Format
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.errors import MissingExtra, UnknownName
from cdm_toolkit.tokdiff.view import TokenizerView

FORMATS = ("parquet", "arrow")
ALIGNMENTS = Format(
    "cdm-alignments", 1, "write it again with `write_alignments`", code=("tokdiff", "alignment")
)
ROWS_PER_BATCH = 1000


def write_alignments(
    folder: Path,
    alignments: Iterable[TextAlignment],
    *,
    sides: tuple[TokenizerView, TokenizerView],
    aligner: str,
    file_format: str = "parquet",
    overwrite: bool = False,
) -> Path:
    """Write alignments as `alignments.parquet` or `.arrow` in a folder, atomically; return the file.

    Columns: text (binary); for both sides (t, s) ids, start and end; groups with t0, t1, s0, s1 of each group; exact,
    whether both sides of a group have the same bytes. The schema's metadata holds the format, both tokenizers with
    their fingerprints, and the provenance. Raises UnknownName, OutputExists, MissingExtra, FileProblem.
    """
    if file_format not in FORMATS:
        raise UnknownName("format", file_format, FORMATS)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise MissingExtra("pyarrow", "export", "an alignment table") from None
    fingerprints = {"teacher": sides[0].fingerprint, "student": sides[1].fingerprint}
    names = {"teacher": sides[0].name, "student": sides[1].name}
    header = ALIGNMENTS.header(provenance(fingerprints=fingerprints), **names, aligner=aligner)
    numbers, group = pa.list_(pa.int64()), pa.list_(pa.list_(pa.int32(), 4))
    columns = {"text": pa.binary()}
    columns |= {f"{column}_{side}": numbers for side in "ts" for column in ("ids", "start", "end")}
    columns |= {"groups": group, "exact": pa.list_(pa.bool_())}
    schema = pa.schema(
        list(columns.items()), metadata={ALIGNMENTS.name: json.dumps(header, ensure_ascii=False)}
    )
    name = f"alignments.{file_format}"
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        target = str(temporary / name)
        writer: Any = (
            pq.ParquetWriter(target, schema) if file_format == "parquet" else pa.ipc.new_file(target, schema)
        )
        with writer:
            rows = _rows(alignments)
            while batch := list(islice(rows, ROWS_PER_BATCH)):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    return folder / name


def _rows(alignments: Iterable[TextAlignment]) -> Iterator[dict[str, Any]]:
    for each in alignments:
        row: dict[str, Any] = {"text": each.t.text_bytes}
        for side, spans in (("t", each.t), ("s", each.s)):
            row |= {f"ids_{side}": spans.ids, f"start_{side}": spans.start, f"end_{side}": spans.end}
        yield row | {"groups": each.alignment.groups.tolist(), "exact": each.alignment.exact}
