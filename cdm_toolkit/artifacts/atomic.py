"""Atomic writes: files and folders that appear complete or not at all."""

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
    """Open a temporary file that replaces `path` when the block ends, and is deleted if it fails.

    It is written in the same folder, flushed to disk, then renamed. FileProblem where it cannot be written.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    with _os_errors_as_file_problems(path):
        _make_folder(path.parent)
        try:
            with temporary.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all. FileProblem where it cannot be written."""
    with atomic_write(path) as stream:
        stream.write(content)


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and is deleted if it fails.

    OutputExists where `path` exists and is not empty, unless `overwrite` is set; it is then replaced at the end.
    FileProblem where it cannot be written.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    with _os_errors_as_file_problems(path):
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise OutputExists(path)
        _make_folder(path.parent)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            replaced = _temporary_sibling(path)
            if path.is_dir():
                path.rename(replaced)
            try:
                temporary.rename(path)
            except BaseException:
                if replaced.is_dir():
                    replaced.rename(path)
                raise
            _sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # its message does not say that the path is a file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


@contextmanager
def _os_errors_as_file_problems(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        fix = "name a folder that you may write to, and that has room"
        raise FileProblem(path, problem, fix) from None


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk; some file systems do not support it for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
