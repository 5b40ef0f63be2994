"""Teacher cache that is filled while it is used: rows come one by one, in any order, from several processes.

What is not yet a shard of the cache lies in parts, each written whole and named by its sha256. When all rows of a shard
are there it is written as `TeacherCache` reads it; a cache that has all rows is one as `write_cache` makes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from cdm_toolkit.artifacts.atomic import write_whole
from cdm_toolkit.artifacts.teacher_cache import (
    DECODED_ROWS,
    CachedRow,
    CacheWriter,
    Shard,
    pack_rows,
    shard_name,
)
from cdm_toolkit.artifacts.teacher_header import CacheHeader

ROWS_IN_MEMORY = 64
"""Rows that are lost at most when a process is killed."""


class ReadThroughCache:
    """Rows of a teacher cache that are there so far."""

    def __init__(self, folder: Path, header: CacheHeader) -> None:
        """Open or begin a cache. BadArtifact where the folder holds another, FileProblem where it cannot be used."""
        self.folder, self.header = folder, header
        self._writer = CacheWriter(folder, header)
        self._fresh: dict[int, CachedRow] = {}
        self._where: dict[int, tuple[Shard, int]] = {}
        self._in_parts: set[int] = set()
        self._known: set[Path] = set()
        self._looked_at = 0
        # a row is asked for ahead, before its step and in it
        self._read = lru_cache(DECODED_ROWS)(Shard.row)
        self._look()

    def row(self, number: int) -> CachedRow | None:
        """Give a row, also one that another process has written; None where it is not there."""
        if (fresh := self._fresh.get(number)) is not None:
            return fresh
        if number not in self._where:
            self._look()
        found = self._where.get(number)
        return found and self._read(*found)

    def put(self, row: CachedRow) -> None:
        """Keep a row. FileProblem where it cannot be written."""
        self._fresh[row.number] = row
        if len(self._fresh) >= ROWS_IN_MEMORY:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory."""
        rows = [self._fresh[number] for number in sorted(self._fresh)]
        if not rows:
            return
        content = pack_rows(self.header, rows)
        path = self.folder / f"part-{_digest(content)}.safetensors"
        write_whole(path, content)
        self._fresh.clear()
        self._add(path)

    def finish(self, numbers: Sequence[int], needed: Collection[int]) -> bool:
        """Make shards of the parts where every `needed` row is there, out of the `numbers` of all rows of the data.

        Rows that nobody needs are empty in them. Gives whether they were made.
        """
        self.flush()
        self._look()
        if not self._where.keys() >= set(needed):
            return False
        size = self.header.rows_per_shard
        for index in range(self.header.shards):
            of_shard = numbers[index * size : (index + 1) * size]
            if not self._in_parts.isdisjoint(of_shard) or self._writer.state(index) != "whole":
                self._writer.write(index, [self.row(number) or self._empty(number) for number in of_shard])
        self._where.clear()
        self._read.cache_clear()
        for path in self.folder.glob("part-*.safetensors"):
            path.unlink(missing_ok=True)
        self._known.clear()
        self._in_parts.clear()
        self._looked_at = 0
        self._look()
        return True

    def _empty(self, number: int) -> CachedRow:
        none = np.empty((0, self.header.k), np.float32)
        return CachedRow(number, np.empty(0, np.int32), 0, none.astype(np.int32), none, none.sum(1))

    def _look(self) -> None:
        """Find the rows of files that are not known yet."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self._looked_at:
            return
        self._looked_at = changed
        for index in range(self.header.shards):
            path = self.folder / f"{shard_name(index)}.safetensors"
            if path not in self._known and self._writer.state(index) == "whole":
                self._add(path)
        for path in self.folder.glob("part-*.safetensors"):
            if path not in self._known and path.stem == f"part-{_digest(path.read_bytes())}":
                self._add(path)

    def _add(self, path: Path) -> None:
        self._known.add(path)
        shard = Shard(path, self.header)
        self._where |= {number: (shard, at) for at, number in enumerate(shard.numbers.tolist())}
        if path.stem.startswith("part-"):
            self._in_parts.update(shard.numbers.tolist())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
