"""seccomp filter: refuse system calls that a computing program does not need.

Refused calls fail with EPERM, so Python raises PermissionError and the program continues; a call with another
architecture's convention kills it. New processes are refused, threads are not. Numbers: the kernel's syscall tables.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Iterator, Mapping

from cdm_toolkit.evaluation.sandbox import kernel

MACHINES: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Supported machines, with the audit architecture that seccomp reports."""

# Name: number on x86_64, on aarch64; None where the machine has no such call.
REFUSED: Mapping[str, tuple[int | None, int | None]] = {
    # the network, and sockets of every kind
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # other processes
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    # memory that is not counted by the limits
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # large, rarely used parts of the kernel with a history of vulnerabilities
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "syslog": (103, 116),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "fork": (57, None),
    "vfork": (58, None),
}
CLONE, CLONE3, PRCTL, PRLIMIT = (56, 220), (435, 435), (157, 167), (302, 261)
CLONE_THREAD = 0x10000
X32_BIT = 0x40000000  # a second table of numbers on x86_64
REFUSED_OPTIONS = (kernel.PR_SET_PDEATHSIG, kernel.PR_SET_DUMPABLE)

LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, JUMP_IF_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, MACHINE_AT, ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data; the low half of the first argument
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
PR_SET_SECCOMP, MODE_FILTER = 22, 2


def install() -> None:
    """Install the filter in this process; PR_SET_NO_NEW_PRIVS must be set before."""
    program = b"".join(struct.pack("=HBBI", *step) for step in steps(platform.machine()))
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
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            yield JUMP_IF_EQUAL, 0, 1, number
            yield RETURN, 0, 0, ERRNO | errno.EPERM
    # With ENOSYS, the C library falls back to clone, whose flags the filter can inspect.
    yield JUMP_IF_EQUAL, 0, 1, CLONE3[column]
    yield RETURN, 0, 0, ERRNO | errno.ENOSYS
    yield JUMP_IF_EQUAL, 0, 4, CLONE[column]
    yield LOAD, 0, 0, ARGUMENT_AT
    yield JUMP_IF_BIT, 1, 0, CLONE_THREAD
    yield RETURN, 0, 0, ERRNO | errno.EPERM
    yield RETURN, 0, 0, ALLOW
    yield JUMP_IF_EQUAL, 0, 4, PRLIMIT[column]
    yield LOAD, 0, 0, ARGUMENT_AT
    yield JUMP_IF_EQUAL, 1, 0, 0  # pid 0: its own limits
    yield RETURN, 0, 0, ERRNO | errno.EPERM
    yield RETURN, 0, 0, ALLOW
    yield JUMP_IF_EQUAL, 0, 1 + len(REFUSED_OPTIONS), PRCTL[column]
    yield LOAD, 0, 0, ARGUMENT_AT
    for index, option in enumerate(REFUSED_OPTIONS):
        yield JUMP_IF_EQUAL, len(REFUSED_OPTIONS) - index, 0, option
    yield RETURN, 0, 0, ALLOW
    yield RETURN, 0, 0, ERRNO | errno.EPERM
