"""Records of data files and of data sets on a hub, read a few at a time: JSONL, JSON, CSV, parquet, arrow."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_toolkit.distill.jsonl import open_text, read_problems, values
from cdm_toolkit.errors import FileProblem, MissingExtra

if TYPE_CHECKING:
    import pyarrow as pa

RECORDS = 1024
"""Records that are in memory together."""
Numbered = Iterator[tuple[int, Any]]
"""Records with their numbers from 1; in JSONL those of the lines, blank ones counted."""


def read_records(path: Path) -> Numbered:
    """Read a file by the ending of its name: .parquet, .arrow, .csv, .tsv, .json, else JSONL; `.gz` may follow.

    A record is a mapping of its fields, those without a value left out. Raises FileProblem, BadRow.
    """
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    with read_problems(path, "give a data file: JSONL, JSON, CSV, parquet or arrow"):
        yield from _READERS.get(ending, values)(path)


def _csv(path: Path) -> Numbered:
    """Read a table whose first line names the columns; all values are texts, an empty one is none."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path, newline="") as lines:
        separator = "\t" if ".tsv" in path.suffixes else ","
        table = csv.DictReader(lines, delimiter=separator, restkey=None, strict=True)
        try:
            for number, record in enumerate(table, 1):
                if None in record:
                    raise FileProblem(
                        path, f"its row {number} has more values than there are columns", _CSV_FIX
                    )
                yield number, {name: value for name, value in record.items() if value}
        except csv.Error as error:
            raise FileProblem(
                path, f"it is not CSV after line {table.line_num} ({error})", _CSV_FIX
            ) from None


_CSV_FIX = "name the columns in the first line, and quote values that have separators or line ends"


def _json(path: Path) -> Numbered:
    """Read a list of objects, as one value; a file that begins otherwise is JSONL under another name."""
    with open_text(path) as file:
        if file.read(1024).lstrip()[:1] != "[":
            yield from values(path)
            return
        file.seek(0)
        try:
            found = json.load(file)
        except json.JSONDecodeError as error:
            problem = f"it is not JSON ({error.msg}, line {error.lineno}, column {error.colno})"
            raise FileProblem(path, problem, "give a list of objects, or JSONL") from None
    yield from enumerate(found, 1)


def _parquet(path: Path) -> Numbered:
    with _arrow_problems(path):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(RECORDS))


def _arrow(path: Path) -> Numbered:
    """Read an Arrow file or stream, such as `datasets` keeps."""
    with _arrow_problems(path) as pa, pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(nth) for nth in range(file.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from _numbered(part for batch in batches for part in _parts(batch))


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    return (batch.slice(first, RECORDS) for first in range(0, len(batch), RECORDS))


def _numbered(batches: Iterator[Any]) -> Numbered:
    records = (record for batch in batches for record in batch.to_pylist())
    return ((number, _filled(record)) for number, record in enumerate(records, 1))


def _filled(record: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what has no value: all records of a table have all its columns."""
    return {name: _without_none(value) for name, value in record.items() if value is not None}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return _filled(value)
    return [_without_none(one) for one in value] if isinstance(value, list) else value


@contextmanager
def _arrow_problems(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingExtra("pyarrow", "train", f"reading {path.suffix} files") from None
    try:
        yield pa
    except pa.ArrowException as error:
        what = path.suffix.lstrip(".")
        raise FileProblem(path, f"it is not {what} ({error})", f"give a {what} file") from None


_READERS: Mapping[str, Any] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def read_hub(name: str, revision: str | None, config: str | None, split: str) -> Numbered:
    """Read a split of a data set on the hub, which `datasets` keeps in its cache. Raises FileProblem."""
    tables = _loaded(name, revision, config, split).with_format("arrow").iter(RECORDS)
    return _numbered(tables)


def _loaded(name: str, revision: str | None, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "train", "reading a data set of the hub") from None
    with _quiet_datasets():
        try:
            found = datasets.load_dataset(name, config, split=split, revision=revision)
        except Exception as error:  # of datasets, huggingface_hub and the HTTP library below them
            raise FileProblem(f"{name}@{revision}" if revision else name, *_why(error)) from None
    if not isinstance(found, datasets.Dataset):
        raise FileProblem(name, f"its split {split!r} is several", "name one, such as train")
    return found


def _why(error: Exception) -> tuple[str, str]:
    """Say in one line why a data set did not come, and what helps."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    if isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = " ".join(str(error).split())[:300]
    if isinstance(error, DatasetNotFoundError):
        fix = "check the spelling, log in or set HF_TOKEN where it is private; a file is named by its path"
        return "there is no such file, and no such data set on the hub", fix
    if isinstance(error, ValueError):
        return f"it cannot be read ({said})", "name its `config` and `split`"
    if isinstance(error, OSError):
        fix = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a file"
        return f"the hub did not give it ({said})", fix
    return f"it cannot be read ({type(error).__name__}: {said})", "give a data set of texts, or files"


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep datasets' own bars and logs off the screen."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()
