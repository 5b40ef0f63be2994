"""Find the rows of a suite: the caller's file, the suite's own file, the project's sample, or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdm_toolkit.distill.jsonl import read_objects, read_text
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.errors import BadRow, FileProblem, MissingExtra, NoData
from cdm_toolkit.evaluation.suites import DataSource, SuiteSpec
from cdm_toolkit.kd.rows import FIELDS, Row
from cdm_toolkit.samples import sample_path

HUB_SECONDS = 10


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows, with its source for display."""

    path: Path
    source: str


def find_data(spec: SuiteSpec, given: Path | None, fields: str = FIELDS) -> DataFile:
    """Find the file of a suite's rows; hub data is stored in the cache folder.

    Raises NoData with all sources that were tried. A file named by the caller or the suite has no fallback: if it is
    missing, reading it raises FileProblem.
    """
    if given is not None:
        return DataFile(given, str(given))
    found = source_file(spec.data, spec.path.parent)
    if isinstance(found, DataFile):
        return found
    raise NoData(spec.name, ["`data`: not given", *found], f"rows that have {fields}")


def source_file(data: DataSource, folder: Path) -> DataFile | list[str]:
    """Find the file of a source, relative to a folder; else return the list of what was tried."""
    if data.file is not None:
        path = folder / data.file
        return DataFile(path, str(path))
    if data.sample is not None:
        path = sample_path(data.sample)
        return DataFile(path, f"{path.name} (cdm_toolkit.samples)")
    if data.hub is not None:
        found = hub_rows(data) if data.hub_file else hub_split(data)
        return found if isinstance(found, DataFile) else [f"{data.hub} on the hub: {found}"]
    return []


def hub_rows(data: DataSource) -> DataFile | str:
    """Download one file of a hub data set, into the hub's cache; else return the reason as text."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        path = hf_hub_download(
            str(data.hub), str(data.hub_file), repo_type="dataset", etag_timeout=HUB_SECONDS
        )
    except Exception as error:  # a dozen kinds, from name resolution to a gated repository
        return "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else _reason(error.__cause__ or error)
    return DataFile(Path(path), f"{data.hub} {data.hub_file} (hub)")


def hub_split(data: DataSource) -> DataFile | str:
    """Store a split of a hub data set as JSONL in the cache folder; else return the reason as text."""
    from cdm_toolkit.artifacts.cache import cache_folder
    from cdm_toolkit.hub.cache_entries import make_entry

    name = f"{str(data.hub).replace('/', '--')}-{data.config or 'default'}-{data.split}"
    folder = cache_folder() / "data" / name
    if not folder.is_dir():
        rows = _download(data)
        if isinstance(rows, str):
            return rows
        lines = [json.dumps(dict(row)) + "\n" for row in rows]

        def fill(making: Path) -> None:
            (making / "rows.jsonl").write_text("".join(lines), encoding="utf-8")

        make_entry(folder, fill)
    return DataFile(folder / "rows.jsonl", f"{data.hub} {data.split} (hub)")


def _download(data: DataSource) -> Iterable[Mapping[str, Any]] | str:
    try:
        from datasets import load_dataset
        from huggingface_hub.errors import OfflineModeIsEnabled
    except ImportError:
        raise MissingExtra("datasets", "eval", f"reading {data.hub} from the hub") from None
    try:
        with suppress(OfflineModeIsEnabled):  # load_dataset has a cache of its own
            _probe(data)
        rows: Iterable[Mapping[str, Any]] = load_dataset(str(data.hub), data.config, split=data.split)
    except Exception as error:  # a dozen kinds, from name resolution to a gated repository
        return _reason(error)
    return rows


def _probe(data: DataSource) -> None:
    """Query the hub once for a data set, because loading it retries for long and prints messages."""
    from huggingface_hub import HfApi

    HfApi().dataset_info(str(data.hub), timeout=HUB_SECONDS)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_passages(path: Path, limit: int | None) -> list[Row]:
    """Read the first rows of a JSONL file, or a `.txt` file as one row. Raises FileProblem and BadRow."""
    if path.suffix != ".txt":
        return read_rows(path)[:limit]
    text = read_text(path)
    if not text:
        raise FileProblem(path, "it is empty", "give a text to score")
    return [Row(1, "", text)]


def read_fields(
    path: Path, shown: str, texts: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read JSONL objects, each with its number, that have some texts, and optional ones, which may be null.

    `shown` names all fields, for messages. Raises FileProblem and BadRow.
    """
    for number, fields in read_objects(path, shown):
        if not isinstance(fields, dict) or not set(texts) <= fields.keys():
            has = ", ".join(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
            raise BadRow(path, number, f"it has {has or 'no field'}", f"give each row {shown}")
        for name in (*texts, *optional):
            if not isinstance(fields.get(name), str if name in texts else str | None):
                raise BadRow(path, number, f"{name} is no text", f"make {name} a string")
        yield number, fields
