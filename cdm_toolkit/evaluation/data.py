"""Where a suite's rows come from: the caller's file, the suite's own, the project's sample, or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdm_toolkit.distill.rows import FIELDS, Row, read_rows
from cdm_toolkit.errors import FileProblem, MissingExtra, NoData
from cdm_toolkit.evaluation.suites import DataSource, SuiteSpec
from cdm_toolkit.samples import sample_path

PROBE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class DataFile:
    """Hold a file of rows and, for a reader of the scores, where it came from."""

    path: Path
    source: str
    from_hub: bool = False


def find_data(spec: SuiteSpec, given: Path | None, fields: str = FIELDS) -> DataFile:
    """Find the file of a suite's rows; what the hub gives is kept in the cache folder.

    Raises NoData with all that was tried. Nothing stands in for a file that the caller or the suite names:
    reading it raises FileProblem.
    """
    data, tried = spec.data, ["--data: not given"]
    if given is not None:
        return DataFile(given, str(given))
    if data.file is not None:
        path = spec.path.parent / data.file
        return DataFile(path, str(path))
    if data.sample is not None:
        path = sample_path(data.sample)
        return DataFile(path, f"{path.name} (cdm_toolkit.samples)")
    if data.hub is not None:
        found = hub_file(data, data.split)
        if isinstance(found, DataFile):
            return found
        tried.append(f"{data.hub} on the hub: {found}")
    raise NoData(spec.name, tried, f"rows that have {fields}")


def hub_file(data: DataSource, split: str) -> DataFile | str:
    """Give a split of the hub's data as JSONL in the cache folder, or say why there is none."""
    from cdm_toolkit.artifacts.cache import cache_folder
    from cdm_toolkit.hub.cache import publish

    name = f"{str(data.hub).replace('/', '--')}-{data.config or 'default'}-{split}"
    folder = cache_folder() / "data" / name
    if not folder.is_dir():
        rows = _download(data, split)
        if isinstance(rows, str):
            return rows
        text = "".join(json.dumps(dict(row)) + "\n" for row in rows)
        publish(folder, lambda making: _write(making / "rows.jsonl", text))
    return DataFile(folder / "rows.jsonl", f"{data.hub} {split} (hub)", from_hub=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _download(data: DataSource, split: str) -> Iterable[Mapping[str, Any]] | str:
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled
    except ImportError:
        raise MissingExtra("datasets", "eval", f"reading {data.hub} from the hub") from None
    try:
        with suppress(OfflineModeIsEnabled):  # load_dataset has a cache of its own
            HfApi().dataset_info(str(data.hub), timeout=PROBE_SECONDS)  # load_dataset would retry for long
        rows: Iterable[Mapping[str, Any]] = load_dataset(str(data.hub), data.config, split=split)
    except Exception as error:  # a dozen kinds, from name resolution to a gated repository
        return " ".join(str(error).split()) or type(error).__name__
    return rows


def read_passages(path: Path, limit: int | None) -> list[Row]:
    """Read the first rows of a JSONL file, or a `.txt` file as one row. Raises FileProblem and BadRow."""
    if path.suffix != ".txt":
        return read_rows(path)[:limit]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileProblem(path, f"it is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise FileProblem(path, error.strerror or str(error)) from None
    if not text:
        raise FileProblem(path, "it is empty", "give a text to score")
    return [Row(1, "", text)]
