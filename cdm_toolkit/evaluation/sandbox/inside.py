"""Entry point inside the sandbox: set up the isolation, start the isolated child process, and wait for it.

Started by `execute.START`. The job is a line of JSON on stdin, reports are lines of JSON on stdout. The work is done by
a child process that has neither, and that is killed when stdin closes, so nothing outlives the caller. The child is
process 1 of its pid namespace: when it ends, the kernel kills all other processes there. Imports are few and light,
because this starts twice for every program.
"""

from __future__ import annotations

import ctypes  # noqa: F401  (imported before isolation, like the other modules that need system libraries)
import importlib
import importlib.machinery
import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NoReturn

from cdm_toolkit.evaluation.sandbox import cgroup, checker, kernel, landlock, seccomp, worker

NOBODY = 65534
# Standard library modules that need shared libraries outside its folders.
SYSTEM_BACKED = ("bz2", "ctypes", "decimal", "hashlib", "lzma", "zlib")
SCRATCH = "/scratch"
MIB = 2**20
INPUT, OUTPUT, VERDICT = 3, 4, 5
"""File descriptors of the isolated process."""


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    try:
        _preload(job["preload"], job["path"])
        library = _library()
        limits = job["limits"]
        together = (
            limits["memory_mib"] + limits["scratch_mib"]
        ) * MIB  # of the child's processes and its files
        with cgroup.MemoryGroup(together) if "cgroup" in job["layers"] else nullcontext() as group:
            child, wake = _start(job, library, group)
            _report(child=child)
            _await(child, wake, group)
    except OSError as error:
        _report(problem=_message(error))


def _start(
    job: Mapping[str, Any], library: Sequence[str], group: cgroup.MemoryGroup | None
) -> tuple[int, int]:
    """Start the isolated child; return its pid, and a descriptor that is readable when it may have ended."""
    layers = job["layers"]
    # RLIMIT_NPROC counts this process in a new user namespace, else all processes of the user.
    others = 1 if "user" in layers else _running(os.getuid() or NOBODY)
    namespaces = tuple(layer for layer in kernel.NAMESPACES if layer in layers)
    if namespaces:
        _enter(namespaces)
    scratch = job["scratch"]
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if "mount" in layers:
        _new_root(library, job["mountpoint"], job["limits"]["scratch_mib"])
        scratch = SCRATCH
    kernel.prctl("PR_SET_DUMPABLE", kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl("PR_SET_CHILD_SUBREAPER", kernel.PR_SET_CHILD_SUBREAPER, 1)
    wake, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    ready, readiness = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _work(job, library, scratch, [nothing, *job["descriptors"], readiness], others, group)
    for descriptor in (readiness, *job["descriptors"]):
        os.close(descriptor)
    problem = b"".join(iter(lambda: os.read(ready, 65536), b"")).decode()
    if problem:
        os.waitpid(child, 0)
        raise OSError(problem)
    return child, wake


def _message(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)


def _report(**words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def _preload(names: Sequence[str], path: Sequence[str]) -> None:
    """Import what cannot be imported after isolation: parts of the standard library, and modules from `path`."""
    for name in SYSTEM_BACKED:
        with suppress(ImportError):
            importlib.import_module(name)
    sys.path += path
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise OSError(f"cannot import {name}: {error}") from error


def _library() -> list[str]:
    """Return the folders of the standard library, and restrict imports to them."""
    folders = [os.path.dirname(os.__file__)]
    compiled = importlib.machinery.PathFinder.find_spec("_ctypes", sys.path)
    if compiled is not None and compiled.origin is not None and os.path.isfile(compiled.origin):
        folders.append(os.path.dirname(compiled.origin))
    sys.path[:] = folders
    sys.path_importer_cache.clear()
    return [folders[0], *(folder for folder in folders[1:] if not folder.startswith(folders[0] + "/"))]


def _enter(namespaces: tuple[str, ...]) -> None:
    """Enter new namespaces; the caller maps the users of the new user namespace."""
    kernel.unshare(namespaces)
    if "user" in namespaces:
        _report(unshared=True)
        if sys.stdin.buffer.readline() != b"mapped\n":
            raise OSError("no user was mapped")


def _new_root(library: Sequence[str], mountpoint: str, scratch_mib: int) -> None:
    """Make a root with the read-only standard library and an empty scratch folder, without /proc and /dev."""
    hidden = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    sources = [os.open(folder, os.O_PATH | os.O_CLOEXEC) for folder in library]
    kernel.mount("root", mountpoint, "tmpfs", hidden, "size=1m,nr_inodes=4096,mode=755")
    for folder, source in zip(library, sources, strict=True):
        target = mountpoint + folder
        os.makedirs(target, mode=0o755, exist_ok=True)
        kernel.mount(f"/proc/self/fd/{source}", target, None, kernel.MS_BIND)
        os.close(source)
        kept = _flags(target)
        kernel.mount(
            None, target, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | hidden | kept
        )
        for name in landlock.PACKAGES:
            if os.path.isdir(covered := f"{target}/{name}"):
                kernel.mount("none", covered, "tmpfs", hidden | kernel.MS_RDONLY, "size=4k,nr_inodes=1")
    os.mkdir(mountpoint + SCRATCH)
    room = f"size={scratch_mib}m,nr_inodes=1024,mode=700,uid={NOBODY},gid={NOBODY}"
    kernel.mount("scratch", mountpoint + SCRATCH, "tmpfs", hidden | kernel.MS_NOEXEC, room)
    kernel.pivot_root(mountpoint)
    kernel.mount(None, "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | hidden)


def _flags(path: str) -> int:
    """Return the flags of a mount that must be kept when it is remounted in a user namespace."""
    found = os.statvfs(path).f_flag
    known = {
        os.ST_NOEXEC: kernel.MS_NOEXEC,
        os.ST_NOATIME: kernel.MS_NOATIME,
        os.ST_NODIRATIME: kernel.MS_NODIRATIME,
        os.ST_RELATIME: kernel.MS_RELATIME,
    }
    return sum(flag for seen, flag in known.items() if found & seen)


def _work(
    job: Mapping[str, Any],
    library: Sequence[str],
    scratch: str,
    descriptors: Sequence[int],
    others: int,
    group: cgroup.MemoryGroup | None,
) -> NoReturn:
    """Isolate this process irreversibly and do the work; setup errors are written to the last descriptor."""
    readiness = descriptors[-1]
    try:
        layers, limits = job["layers"], job["limits"]
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if group is not None:
            group.enter()
        readiness = _take_descriptors(descriptors)
        os.chdir(scratch)
        os.environ.clear()
        os.environ.update(HOME=scratch, TMPDIR=scratch)
        os.umask(0o077)
        _become_nobody()
        kernel.prctl("PR_SET_PDEATHSIG", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit(limits, others)
        kernel.prctl("PR_SET_DUMPABLE", kernel.PR_SET_DUMPABLE, 0)
        kernel.prctl("PR_SET_NO_NEW_PRIVS", kernel.PR_SET_NO_NEW_PRIVS, 1)
        if not os.access(library[0], os.R_OK | os.X_OK):
            raise OSError(f"{library[0]}: the standard library is closed to the user nobody")
        if "landlock" in layers:
            landlock.restrict(library, scratch)
        if "seccomp" in layers:
            seccomp.install()
    except OSError as error:
        os.write(readiness, _message(error).encode())
        os._exit(1)
    os.close(readiness)
    role = checker.check if job["role"] == "checker" else worker.serve
    try:
        role(job["work"], INPUT, OUTPUT, VERDICT)
    finally:
        os._exit(0)


def _take_descriptors(given: Sequence[int]) -> int:
    """Move the first descriptor to 0, 1 and 2, the others after it; close all else; return the last one's number."""
    wanted = [given[0], given[0], *given]
    above = max(*wanted, len(wanted)) + 1
    for number, descriptor in enumerate(wanted):
        os.dup2(descriptor, above + number)
    for number in range(len(wanted)):
        os.dup2(above + number, number, inheritable=False)
    os.closerange(len(wanted), 65536)
    return len(wanted) - 1


def _become_nobody() -> None:
    """Drop root, if this process is root, and all capabilities."""
    kernel.drop_capabilities_bound()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.drop_capabilities()


def _limit(limits: Mapping[str, Any], others: int) -> None:
    ceilings = {
        resource.RLIMIT_CPU: math.ceil(limits["cpu_seconds"]),
        resource.RLIMIT_AS: limits["memory_mib"] * MIB,
        resource.RLIMIT_FSIZE: limits["scratch_mib"] * MIB,
        resource.RLIMIT_NPROC: others + limits["processes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for which, ceiling in ceilings.items():
        resource.setrlimit(which, (ceiling, ceiling))


def _running(uid: int) -> int:
    """Count the threads of a user."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def _await(child: int, wake: int, group: cgroup.MemoryGroup | None) -> None:
    """Wait until the child ends or stdin closes, kill what is left, and report the child's wait status."""
    status = None
    while status is None:
        ready, _, _ = select.select([sys.stdin.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, 65536)
        if sys.stdin.fileno() in ready:
            os.kill(child, signal.SIGKILL)
        found, ended, usage = os.wait4(child, 0 if sys.stdin.fileno() in ready else os.WNOHANG)
        if found:
            status = ended
    _kill_orphans()
    killed = 0 if group is None else group.killed()
    _report(status=status, cpu_seconds=usage.ru_utime + usage.ru_stime, killed=killed)


def _kill_orphans() -> None:
    """Kill the child's orphans, which without a pid namespace become children of this process."""
    me = os.getpid()
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError), open(f"/proc/{pid}/stat", encoding="latin-1") as stat:
                if int(stat.read().rpartition(")")[2].split()[1]) == me:  # its parent
                    os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.001)
