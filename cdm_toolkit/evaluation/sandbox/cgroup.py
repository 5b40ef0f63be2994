"""Control groups: limit the memory of all processes of a program together.

A group lies below that of the caller (cgroup v1), or below the nearest one above it that controls the memory of its
children (cgroup v2, where a group cannot have both processes and such children). It counts what no limit of a single
process does: other processes, files in memory, tables of the kernel. Existing groups are not changed. Source: the
kernel's admin-guide/cgroup-v1/memory and admin-guide/cgroup-v2.
"""

from __future__ import annotations

import errno
import os
import time

PREFIX = "cdm-sandbox-"
# By version: the files of the limit, of the limit of swap (v1: of both together), of the count of killed processes, and
# of the members; v1's `tasks` takes a process of one thread without the 15 ms that `cgroup.procs` waits for others.
FILES = {
    1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control", "tasks"),
    2: ("memory.max", "memory.swap.max", "memory.events", "cgroup.procs"),
}
REMOVE_SECONDS = 2.0


class MemoryGroup:
    """A control group of its own, removed at the end of the context, when its processes have ended."""

    def __init__(self, limit: int) -> None:
        """Make a group with a limit in bytes. Raises OSError where the machine gives none."""
        parent, version = find_parent(_text("/proc/self/cgroup"), _text("/proc/self/mountinfo"))
        ceiling, swap, events, members = FILES[version]
        self._name = PREFIX + os.urandom(8).hex()
        try:
            os.mkdir(f"{parent}/{self._name}")
        except OSError as error:
            raise OSError(error.errno, error.strerror, parent) from None
        # Descriptors remain valid in the namespaces to be entered, where paths and rights do not.
        self._parent = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._write(ceiling, limit)
            if os.path.exists(f"{parent}/{self._name}/{swap}"):  # not where the kernel does not count swap
                self._write(swap, limit if version == 1 else 0)
            self._members = self._open(members, os.O_WRONLY)
            self._events = self._open(events, os.O_RDONLY)
        except OSError:
            self.remove()
            raise

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def enter(self) -> None:
        """Move this process, of one thread, into the group; its children are born there."""
        os.write(self._members, b"0")

    def killed(self) -> int:
        """Count the processes that the kernel has killed because the group reached its limit."""
        lines = os.pread(self._events, 4096, 0).decode().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def remove(self) -> None:
        """Remove the group. A process can belong to it for a moment after it has been waited for."""
        deadline = time.monotonic() + REMOVE_SECONDS
        while True:
            try:
                return os.rmdir(self._name, dir_fd=self._parent)
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.001)

    def _open(self, name: str, flags: int) -> int:
        return os.open(f"{self._name}/{name}", flags | os.O_CLOEXEC, dir_fd=self._parent)

    def _write(self, name: str, value: int) -> None:
        descriptor = self._open(name, os.O_WRONLY)
        try:
            os.write(descriptor, str(value).encode())
        finally:
            os.close(descriptor)


def find_parent(groups: str, mounts: str) -> tuple[str, int]:
    """Find the folder of the group to make others in, and the version of cgroups, from /proc's cgroup and mountinfo.

    Raises OSError where no group can control memory.
    """
    own: dict[str, str] = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    version = 1 if "memory" in own else 2
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        (root, point), (kind, _, options) = before.split()[3:5], after.split()[:3]
        if (kind == "cgroup" and "memory" in options.split(",")) if version == 1 else kind == "cgroup2":
            folder = _inside(point, root, own["memory" if version == 1 else ""])
            return (folder if version == 1 else _controlling(folder, point)), version
    raise OSError("no cgroups are mounted")


def _inside(point: str, root: str, path: str) -> str:
    """Return the folder of a group, where `root` of all groups is mounted at `point`."""
    root = root.rstrip("/")
    if not f"{path}/".startswith(f"{root}/") or "/.." in path:
        raise OSError("its control group is not mounted")
    return point + path.removeprefix(root).rstrip("/")


def _controlling(folder: str, top: str) -> str:
    """Return the nearest group, from `folder` up to `top`, that controls the memory of its children."""
    here = folder
    while "memory" not in _text(f"{here}/cgroup.subtree_control").split():
        if here == top:
            raise OSError(f"no control group from {folder} up to {top} controls the memory of its children")
        here = os.path.dirname(here)
    return here


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
