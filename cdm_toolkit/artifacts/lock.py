"""Locks between processes, as files beside what they protect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cdm_toolkit.errors import FileProblem


@contextmanager
def locked(lock_file: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time into a block; another calls `on_wait`, which may raise, and waits.

    The lock goes with the process that holds it, however that ends; its file stays. FileProblem where the folder
    cannot be written.
    """
    lock = FileLock(lock_file)
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
    except OSError as error:
        problem = f"it cannot be written ({error.strerror or error})"
        raise FileProblem(lock_file.parent, problem, "name a folder that you may write to") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(lock_file: Path) -> bool:
    """Say whether a process is in the block of `locked`."""
    if not lock_file.is_file():
        return False
    try:
        with FileLock(lock_file, timeout=0):
            return False
    except Timeout:
        return True
