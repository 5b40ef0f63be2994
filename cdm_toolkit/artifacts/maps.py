"""Mappings and neighbour tables on disk: safetensors with a JSON header.

The header holds format and version, both tokenizers with their fingerprints, the build settings and the provenance.
Its checksum covers the arrays, which safetensors itself does not verify.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cdm_toolkit.artifacts.atomic import write_whole
from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.artifacts.code_fingerprint import code_fingerprint
from cdm_toolkit.artifacts.manifest import Format
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.errors import BadArtifact, FileProblem
from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.types import (
    Neighbours,
    NeighbourTable,
    VocabMap,
    check_tokenizers,
    pair_info,
)

MADE_BY = ("tokdiff", "vocab_map")
MAP = Format("cdm-toolkit vocabulary mapping", 2, "write it again with `export_map`", code=MADE_BY)
TABLE = Format("cdm-toolkit neighbour table", 2, "build it again with `build_neighbours`", code=MADE_BY)
HEADER = "cdm_toolkit"

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSettings:
    """How a mapping is built. Those who build it check the values."""

    strategy: str = "contextual"
    """contextual: equal bytes, else all near tokens. exact: only equal bytes. min-ed: the nearest by edit distance.
    prefix: the longest student token that is a prefix of the teacher's."""
    max_edit_distance: float = 0.3
    """Near tokens have an edit distance below this fraction of their total length."""
    match_digits: bool = True
    """Only match tokens with equal digits and operators."""
    workers: int = 2
    """Number of threads."""


def save_map(path: str | Path, mapping: VocabMap) -> None:
    """Write a mapping; FileProblem where it cannot be written."""
    _save(path, mapping, map_header(mapping))


def load_map(path: str | Path, view_t: TokenizerView, view_s: TokenizerView) -> VocabMap:
    """Read a mapping for these tokenizers.

    FileProblem where there is no such file, BadArtifact where it is damaged, of another format or version,
    TokenizerMismatch where it was built for other tokenizers.
    """
    facts, arrays = _load(path, MAP)
    mapping = _made(path, MAP, lambda: VocabMap(**_fields_of(VocabMap, facts | arrays)))
    check_tokenizers(f"the mapping {path}", mapping, pair_info(view_t, view_s))
    return mapping


def save_table(path: str | Path, table: NeighbourTable) -> None:
    """Write a neighbour table; FileProblem where it cannot be written."""
    counts = {"t_to_s": len(table.t_to_s.ids), "s_to_t": len(table.s_to_t.ids)}
    _save(path, table, _header(TABLE, table, counts))


def load_table(path: str | Path, view_t: TokenizerView, view_s: TokenizerView) -> NeighbourTable:
    """Read a neighbour table for these tokenizers. Raises as `load_map`."""
    facts, arrays = _load(path, TABLE)

    def made() -> NeighbourTable:
        ways = {
            way: Neighbours(**{field.name: arrays[f"{way}.{field.name}"] for field in fields(Neighbours)})
            for way in ("t_to_s", "s_to_t")
        }
        return NeighbourTable(**_fields_of(NeighbourTable, facts | ways))

    table = _made(path, TABLE, made)
    check_tokenizers(f"the neighbour table {path}", table, pair_info(view_t, view_s))
    return table


def load_or_build_neighbours(
    view_t: TokenizerView,
    view_s: TokenizerView,
    *,
    max_edit_distance: float,
    match_digits: bool = True,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> NeighbourTable:
    """Read the neighbour table of two tokenizers from the cache, or build it and store it there.

    A damaged entry is rebuilt. FileProblem where the cache cannot be written; BadOption as
    `build_neighbours`.
    """
    path = cached_table(view_t, view_s, max_edit_distance=max_edit_distance, match_digits=match_digits)
    if path.is_file():
        try:
            return load_table(path, view_t, view_s)
        except BadArtifact:
            path.unlink()
    # Imported here because numba is slow to import, and only building needs it.
    from cdm_toolkit.vocab_map.neighbours import build_neighbours

    table = build_neighbours(
        view_t,
        view_s,
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
        workers=workers,
        progress=progress,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"the cache cannot be written ({error.strerror})"
        raise FileProblem(path.parent, problem, "set CDM_CACHE to a folder that can be written") from None
    save_table(path, table)
    return table


def cached_table(
    view_t: TokenizerView, view_s: TokenizerView, *, max_edit_distance: float, match_digits: bool
) -> Path:
    """Say where the cache keeps the table of two tokenizers."""
    code, fingerprints = code_fingerprint(*MADE_BY), (view_t.fingerprint, view_s.fingerprint)
    key = json.dumps([TABLE.version, code, *fingerprints, max_edit_distance, match_digits])
    return cache_folder() / "neighbours" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def map_header(mapping: VocabMap) -> dict[str, Any]:
    """Return a mapping's header: everything but the arrays."""
    counts = {"matched": int(mapping.matched.sum()), "entries": len(mapping.ids)}
    return _header(MAP, mapping, counts)


def _header(kind: Format, built: VocabMap | NeighbourTable, counts: Mapping[str, int]) -> dict[str, Any]:
    fingerprints = {"teacher": built.fingerprint_t, "student": built.fingerprint_s}
    values = {field.name: getattr(built, field.name) for field in fields(built)}
    facts = {name: value for name, value in values.items() if isinstance(value, str | float | int | None)}
    return kind.header(provenance(fingerprints=fingerprints), **facts, counts=counts)


def _save(path: str | Path, built: VocabMap | NeighbourTable, header: Mapping[str, Any]) -> None:
    arrays = dict(_arrays(built))
    header = {**header, "checksum": _checksum(arrays)}
    write_whole(path, save(arrays, {HEADER: json.dumps(header, ensure_ascii=False)}))


def _arrays(record: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """List the arrays of a record by name, those of a record within by their path."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, np.ndarray):
            yield prefix + field.name, value
        elif is_dataclass(value):
            yield from _arrays(value, f"{prefix}{field.name}.")


def _load(path: str | Path, kind: Format) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read header and arrays."""
    again = kind.again
    if not Path(path).is_file():
        raise FileProblem(path, "there is no such file", f"check the path, or {again}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            kind.check(path, header)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise BadArtifact(path, f"it is damaged or no safetensors file ({error})", again) from None
    except OSError as error:
        raise FileProblem(path, f"cannot be read ({error.strerror or error})", "check the path") from None
    if _checksum(arrays) != header.get("checksum"):
        raise BadArtifact(path, "it is damaged: its checksum is wrong", again)
    return header, arrays


def _made(path: str | Path, kind: Format, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except (KeyError, TypeError) as error:
        problem = f"its contents are not complete ({error})"
        raise BadArtifact(path, problem, kind.again) from None


def _fields_of(record: type[VocabMap] | type[NeighbourTable], found: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: found[field.name] for field in fields(record) if field.name in found}


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, crc)
    return crc
