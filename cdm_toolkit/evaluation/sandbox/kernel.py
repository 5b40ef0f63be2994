"""System calls that Python 3.11 does not have; each raises OSError with the name of the call."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

NAMESPACES: Mapping[str, int] = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_RELATIME = 1 << 10, 1 << 11, 1 << 21
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def check(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(name: str, number: int, *arguments: object) -> int:
    """Make a system call. Arguments are pointers or integers; integers are passed as C longs."""
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return check(name, _libc.syscall(ctypes.c_long(number), *passed))


def prctl(name: str, option: int, *arguments: object) -> int:
    passed = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    passed += [ctypes.c_ulong(0)] * (4 - len(passed))
    return check(f"prctl {name}", _libc.prctl(option, *passed))


def unshare(layers: tuple[str, ...]) -> None:
    """Enter new namespaces; a new pid namespace applies to the next child."""
    check("unshare", _libc.unshare(sum(NAMESPACES[layer] for layer in layers)))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    check(f"mount {target}", _libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def pivot_root(folder: str) -> None:
    """Make a mounted folder the root, and unmount the old root."""
    os.chdir(folder)
    check("pivot_root", _libc.pivot_root(b".", b"."))
    check("umount", _libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def drop_capabilities_bound() -> None:
    """Remove all capabilities from the bounding set, so that no exec can regain them; needs CAP_SETPCAP."""
    for capability in range(64):
        try:
            prctl("PR_CAPBSET_DROP", PR_CAPBSET_DROP, capability)
        except OSError:
            return  # the first one unknown to the kernel, or CAP_SETPCAP is missing


def drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    prctl("PR_CAP_AMBIENT", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    check("capset", _libc.capset(header, nothing))
