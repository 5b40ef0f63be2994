"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cdm_toolkit.errors import FileProblem, OutputExists


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends, and leaves no trace if it fails.

    Written beside, flushed to disk, then renamed. FileProblem where it cannot be written.
    """
    path = Path(path)
    beside = _beside(path)
    with _explained(path):
        _make_folder(path.parent)
        try:
            with beside.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(path)
            _sync(path.parent)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to fill that becomes `path` when the block ends, and leaves no trace if it fails.

    OutputExists where `path` is there and not empty, unless `overwrite` is set; it is then replaced at the end.
    FileProblem where it cannot be written.
    """
    path = Path(path)
    beside = _beside(path)
    with _explained(path):
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise OutputExists(path)
        _make_folder(path.parent)
        try:
            beside.mkdir()
            yield beside
            for file in beside.rglob("*"):
                _sync(file)
            replaced = _beside(path)
            if path.is_dir():
                path.rename(replaced)
            try:
                beside.rename(path)
            except BaseException:
                if replaced.is_dir():
                    replaced.rename(path)
                raise
            _sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # says nothing of what is wrong: that it is no folder
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        fix = "name a place in a folder that you may write to, and that has room"
        raise FileProblem(path, problem, fix) from None


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk; some file systems know no such thing for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
