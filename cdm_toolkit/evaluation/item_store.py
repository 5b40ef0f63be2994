"""Store of finished items, one JSON line each, from which an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from cdm_toolkit.artifacts.lock import locked
from cdm_toolkit.artifacts.manifest import differences
from cdm_toolkit.errors import BadArtifact, FileProblem
from cdm_toolkit.evaluation.scores import Item


class ItemFile:
    """The finished items of one model on one suite; on disk if a stream is given."""

    def __init__(self, stream: BinaryIO | None = None) -> None:
        self.items: dict[str, Item] = {}
        self._stream = stream

    def keep(self, item: Item) -> None:
        """Add an item. It is on disk when this returns."""
        if item.key in self.items:
            raise ValueError(f"the item {item.key} is finished already")
        if self._stream is not None:
            _write_line(self._stream, asdict(item))
        self.items[item.key] = item


@contextmanager
def open_items(path: Path | None, run: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[ItemFile]:
    """Open a file of items for appending, and load the items in it, unless it is to be overwritten.

    Without a path, the items are in memory alone.

    The first line is `run`, the settings that must be equal for items to be combined. An incomplete last line of a
    killed run is dropped. Raises BadArtifact where `run` differs or a line is damaged, FileProblem where it
    cannot be written or another process writes to it.
    """
    if path is None:
        yield ItemFile()
        return
    with locked(path.with_name(f".{path.name}.lock"), lambda: _refuse(path)), _opened(path) as stream:
        if overwrite:
            stream.truncate(0)
        file = ItemFile(stream)
        lines, whole = _whole_lines(stream)
        if lines:
            _check_run(path, lines[0], run)
            for number, line in enumerate(lines[1:], 2):
                item = _item(path, number, line)
                file.items[item.key] = item
        stream.truncate(whole)
        stream.seek(0, os.SEEK_END)
        if not lines:
            _write_line(stream, {"run": dict(run)})
        yield file


def file_name(model: str) -> str:
    r"""Make a file name from the name of a model; different models get different names.

    >>> file_name("smollm2")
    'smollm2'
    >>> file_name("out/student") == file_name("out-student")
    False
    """
    plain = re.sub(r"[^\w.+-]+", "-", model).strip("-.")[-80:]
    return plain if plain == model else f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _refuse(path: Path) -> None:
    raise FileProblem(path, "another run writes to it", "wait for it, or name another `output`")


def _opened(path: Path) -> BinaryIO:
    """Open a file for reading and appending."""
    try:
        return path.open("a+b", buffering=0)
    except OSError as error:
        why = f"it cannot be written ({error.strerror or error})"
        raise FileProblem(path, why, "choose an `output` that you may write to") from None


def _whole_lines(stream: BinaryIO) -> tuple[list[bytes], int]:
    """Read all complete lines, and the offset of their end."""
    stream.seek(0)
    content = stream.read()
    whole = content.rfind(b"\n") + 1
    return content[:whole].splitlines(), whole


def _write_line(stream: BinaryIO, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False)
    stream.write(text.encode("utf-8", errors="backslashreplace") + b"\n")
    os.fsync(stream.fileno())


def _item(path: Path, number: int, line: bytes) -> Item:
    try:
        return Item(**json.loads(line))
    except (ValueError, TypeError):
        problem = f"line {number} is no finished item"
        raise BadArtifact(path, problem, "remove that line, or start anew with `overwrite`") from None


def _check_run(path: Path, line: bytes, run: Mapping[str, Any]) -> None:
    try:
        before = json.loads(line)["run"]
        differ = list(differences(before, run))
    except (ValueError, TypeError, KeyError):
        problem = "its first line does not say which run it is of"
        raise BadArtifact(path, problem, "name another `output`, or start anew with `overwrite`") from None
    if differ:
        fix = "run it as before to go on, name another `output`, or start anew with `overwrite`"
        raise BadArtifact(path, f"it is of another run: {'; '.join(differ)}", fix)
