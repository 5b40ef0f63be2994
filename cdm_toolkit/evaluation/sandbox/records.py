"""Input and output types of the sandbox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from cdm_toolkit.artifacts.settings import Settings

LAYERS = ("user", "mount", "pid", "network", "ipc", "uts", "landlock", "seccomp")
"""Isolation layers that a machine may lack: six namespaces, path rules (Landlock), system call filter (seccomp)."""
CGROUP = "cgroup"
"""A control group for the memory of all processes of a program together: used where the machine gives one, not needed
for isolation, because seccomp forbids other processes."""

Reason = Literal[
    "passed",  # the test ran to its end
    "failed",  # an assertion did not hold
    "raised",  # the program or the test raised something else
    "unloadable",  # the program could not be loaded: a syntax error, or its top level raised
    "ended",  # the program's process ended before it returned
    "cpu",  # the same, at the limit of processor time
    "timeout",  # the limit of wall time was reached
    "not plain",  # it returned something that is not a plain value, or is too large
    "unchecked",  # the test is not conclusive: it called nothing, or with arguments that are not plain
]


class Limits(Settings):
    """Resource limits of a program. Its test, in a separate process, has the same limits."""

    wall_seconds: float = Field(default=15.0, gt=0)
    """From the start of its process to the end of its tests."""
    cpu_seconds: int = Field(default=5, ge=1)
    memory_mib: int = Field(default=512, ge=64)
    """Address space of a process; with `scratch_mib`, also the memory of all its processes and files together, where
    the machine has control groups."""
    scratch_mib: int = Field(default=16, ge=1)
    """Total size of the scratch folder, and of each file."""
    processes: int = Field(default=16, ge=1)
    """Threads; also processes, where seccomp does not forbid them."""
    open_files: int = Field(default=64, ge=16)
    answer_mib: int = Field(default=8, ge=1)
    """Size of one encoded result."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program and its test."""

    source: str
    entry_point: str
    """The function that the test calls, by this name or as `candidate`."""
    test: str
    """Source that defines `check(candidate)`, or asserts as it is executed."""
    helpers: str = ""
    """Source code that the test may use; from the data set, never from the program."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of running a program."""

    reason: Reason
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


@dataclass(frozen=True, slots=True)
class Isolation:
    """The isolation layers in use, and the missing ones."""

    layers: tuple[str, ...]
    missing: tuple[tuple[str, str], ...] = ()
    """Missing layers, each with the reason."""

    def __str__(self) -> str:
        on = ", ".join((*self.layers, "no new privileges", "resource limits"))
        lacking = "; ".join(f"{layer} ({why})" for layer, why in self.missing)
        return on + (f"; without {lacking}" if lacking else "")
