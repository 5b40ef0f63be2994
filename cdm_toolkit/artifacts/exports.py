"""Export mappings for other tools: json, csv, parquet, and a dense vector of ids."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cdm_toolkit.artifacts.atomic import write_whole
from cdm_toolkit.artifacts.manifest import write_json
from cdm_toolkit.artifacts.maps import HEADER, map_header, save_map
from cdm_toolkit.errors import MissingExtra, UnknownName
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.types import VocabMap

PairRow = tuple[int, str, int, str, float]
COLUMNS = ("teacher_id", "teacher_token", "student_id", "student_token", "weight")


FILE_FORMATS = ("safetensors", "json", "csv", "parquet", "npy")


def export_map(
    path: str | Path,
    mapping: VocabMap,
    view_t: TokenizerView,
    view_s: TokenizerView,
    *,
    file_format: str,
) -> list[Path]:
    """Write a mapping in one of `FILE_FORMATS`; return the files written.

    json, csv and parquet have a row for each pair, with both ids. npy is a dense int64 vector: the index is the
    teacher id, the value the best student id or −1. The header of csv and npy files is written next to them, as
    `PATH.header.json`. UnknownName, MissingExtra without pyarrow, FileProblem.
    """
    if file_format not in FILE_FORMATS:
        raise UnknownName("format", file_format, FILE_FORMATS)
    path, header, rows = Path(path), map_header(mapping), _rows(mapping, view_t, view_s)
    if file_format == "safetensors":
        save_map(path, mapping)
    elif file_format == "json":
        write_whole(path, _json(rows, header))
    elif file_format == "csv":
        write_whole(path, _csv(rows))
    elif file_format == "parquet":
        write_whole(path, _parquet(rows, header))
    else:
        write_whole(path, _npy(mapping))
    if file_format not in ("csv", "npy"):
        return [path]
    beside = path.with_name(f"{path.name}.header.json")
    write_json(beside, header)
    return [path, beside]


def _rows(mapping: VocabMap, view_t: TokenizerView, view_s: TokenizerView) -> Iterator[PairRow]:
    teacher_ids = np.repeat(np.arange(mapping.size_t), np.diff(mapping.indptr)).tolist()
    for teacher_id, student_id, weight in zip(
        teacher_ids, mapping.ids.tolist(), mapping.weights.tolist(), strict=True
    ):
        text_t, text_s = view_t.token_text(teacher_id), view_s.token_text(student_id)
        yield teacher_id, text_t, student_id, text_s, round(weight, 6)


def _json(rows: Iterable[PairRow], header: Mapping[str, Any]) -> bytes:
    """Encode one JSON object with one pair per line, which works with grep and diff."""
    head = json.dumps(header, ensure_ascii=False, indent=1).removesuffix("\n}")
    pairs = ",\n".join(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) for row in rows)
    return f'{head},\n "pairs": [\n{pairs}\n]}}\n'.encode()


def _csv(rows: Iterable[PairRow]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue().encode()


def _npy(mapping: VocabMap) -> bytes:
    content = io.BytesIO()
    np.save(content, mapping.dense())
    return content.getvalue()


def _parquet(rows: Iterable[PairRow], header: Mapping[str, Any]) -> bytes:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise MissingExtra("pyarrow", "export", "the parquet format") from None
    types = (pa.int32(), pa.string(), pa.int32(), pa.string(), pa.float32())
    meta = {HEADER: json.dumps(header, ensure_ascii=False)}
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)), metadata=meta)
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    arrays = [pa.array(column, type) for column, type in zip(columns, types, strict=True)]
    content = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), content)
    return content.getvalue()
