"""seccomp filter: allow the system calls that a computing program needs, and no others.

Other calls fail, so that the program continues: the older ones with EPERM (in Python PermissionError), those since
Linux 5.1 with ENOSYS, as on an older kernel, because C libraries then fall back to an older call. A call with another
architecture's convention kills the program. New processes are refused, threads are not. Numbers: the kernel's syscall
tables. The list: what CPython 3.11 to 3.14, glibc and musl use once the program runs; docs/sandbox.md says how it was
found.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Mapping

from cdm_toolkit.evaluation.sandbox import kernel

MACHINES: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Supported machines, with the audit architecture that seccomp reports."""

# Name: number on x86_64, on aarch64; None where the machine has no such call.
ALLOWED: Mapping[str, tuple[int | None, int | None]] = {
    # open files and pipes
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "lseek": (8, 62),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "fadvise64": (221, 223),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    # files by name, which the mount namespace and Landlock restrict
    "open": (2, None),
    "openat": (257, 56),
    "creat": (85, None),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "stat": (4, None),
    "lstat": (6, None),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "utimensat": (280, 88),
    "umask": (95, 166),
    # memory of its own, which is limited
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "msync": (26, 227),
    "membarrier": (324, 283),
    # threads
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "gettid": (186, 178),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # its own signals and timers
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137),
    "rt_sigreturn": (15, 139),
    "restart_syscall": (219, 128),
    "sigaltstack": (131, 132),
    "pause": (34, None),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    # time and randomness
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrandom": (318, 278),
    # who and where it is
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getpgid": (121, 155),
    "getpgrp": (111, None),
    "getsid": (124, 156),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "getrusage": (98, 165),
    "uname": (63, 160),
    "sysinfo": (99, 179),
}
# Name: numbers, the index of an argument, and the values that it may have; the kernel reads 32 bits of each.
ALLOWED_WITH: Mapping[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    # Threads, with the flags of glibc and of musl; the new clone3 is refused, its flags are out of a filter's sight.
    "clone": ((56, 220), 0, (0x3D0F00, 0x7D0F00)),
    # PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_GET_SECCOMP, PR_GET_NO_NEW_PRIVS
    "prctl": ((157, 167), 0, (3, 15, 16, 21, 39)),
    # pid 0: its own limits
    "prlimit64": ((302, 261), 0, (0,)),
    # F_DUPFD to F_SETLKW, F_OFD_GETLK to F_OFD_SETLKW, F_DUPFD_CLOEXEC; not F_SETOWN, which sends signals to others
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)),
    # TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, FICLONE
    "ioctl": ((16, 29), 1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x40049409)),
}
FIRST_NEW_CALL = 424  # of Linux 5.1; from here on, numbers are the same on every machine
X32_BIT = 0x40000000  # a second table of numbers on x86_64

LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
# In struct seccomp_data; the low half of an argument comes first.
NUMBER_AT, MACHINE_AT, ARGUMENTS_AT = 0, 4, 16
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
PR_SET_SECCOMP, MODE_FILTER = 22, 2


def install() -> None:
    """Install the filter in this process; PR_SET_NO_NEW_PRIVS must be set before."""
    program = b"".join(struct.pack("=HBBI", *step) for step in steps(os.uname().machine))
    buffer = ctypes.create_string_buffer(program, len(program))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    described = Filter(len(program) // 8, ctypes.addressof(buffer))
    kernel.prctl("PR_SET_SECCOMP", PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(described))


def steps(machine: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield the BPF instructions of the filter: (code, jump if true, jump if false, operand)."""
    column = tuple(MACHINES).index(machine)
    yield LOAD, 0, 0, MACHINE_AT
    yield JUMP_IF_EQUAL, 1, 0, MACHINES[machine]
    yield RETURN, 0, 0, KILL
    yield LOAD, 0, 0, NUMBER_AT
    if machine == "x86_64":
        yield JUMP_IF_AT_LEAST, 0, 1, X32_BIT
        yield RETURN, 0, 0, KILL
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            yield JUMP_IF_EQUAL, 0, 1, number
            yield RETURN, 0, 0, ALLOW
    for pair, index, values in ALLOWED_WITH.values():
        yield JUMP_IF_EQUAL, 0, len(values) + 3, pair[column]
        yield LOAD, 0, 0, ARGUMENTS_AT + 8 * index
        for place, value in enumerate(values):
            yield JUMP_IF_EQUAL, len(values) - place, 0, value
        yield RETURN, 0, 0, ERRNO | errno.EPERM
        yield RETURN, 0, 0, ALLOW
    yield JUMP_IF_AT_LEAST, 0, 1, FIRST_NEW_CALL
    yield RETURN, 0, 0, ERRNO | errno.ENOSYS
    yield RETURN, 0, 0, ERRNO | errno.EPERM
