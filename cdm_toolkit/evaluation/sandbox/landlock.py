"""Landlock, unprivileged path rules of the kernel: read the standard library, use the scratch folder, nothing else.

Source: the kernel's userspace-api/landlock documentation. System call numbers are the same on every machine.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from cdm_toolkit.evaluation.sandbox import kernel

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION_FLAG, PATH_BENEATH = 1, 1
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
PACKAGES = ("site-packages", "dist-packages")
"""Folders inside the standard library's folder that are not part of it, and may hold a data set with the answers."""


def version() -> int:
    """Return the kernel's version of the Landlock interface. Raises OSError where it has none."""
    return kernel.syscall("landlock_create_ruleset", CREATE_RULESET, None, 0, VERSION_FLAG)


def restrict(library: Sequence[str], scratch: str) -> None:
    """Restrict this process to the library and scratch folders; PR_SET_NO_NEW_PRIVS must be set before."""
    abi = version()
    paths = (1 << 13) - 1 | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
    network, scope = (3, 3) if abi >= 6 else (3 if abi >= 4 else 0, 0)
    attributes = (ctypes.c_uint64 * 3)(paths, network, scope)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = kernel.syscall("landlock_create_ruleset", CREATE_RULESET, attributes, size, 0)
    for folder in library:
        _allow(ruleset, folder, READ_DIR)
        for entry in os.scandir(folder):
            if entry.name not in PACKAGES and os.path.exists(entry.path):  # skips broken links
                _allow(ruleset, entry.path, READ_FILE | (READ_DIR if entry.is_dir() else 0) | EXECUTE)
    _allow(ruleset, scratch, paths & ~(EXECUTE | MAKE_CHAR | MAKE_SOCK | MAKE_BLOCK))
    kernel.syscall("landlock_restrict_self", RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def _allow(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = ctypes.byref(_PathBeneath(access, descriptor))
        kernel.syscall(f"landlock_add_rule {path}", ADD_RULE, ruleset, PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)
