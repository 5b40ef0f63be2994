"""What goes into the sandbox and comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from cdm_toolkit.artifacts.settings import Settings

LAYERS = ("user", "mount", "pid", "network", "ipc", "uts", "landlock", "seccomp")
"""Walls that a machine may lack: six namespaces, the kernel's path rules, and its filter of system calls."""

Reason = Literal[
    "passed",  # the test came to its end
    "failed",  # an assertion did not hold
    "raised",  # the program or the test raised something else
    "unloadable",  # the program could not be loaded: its syntax, or what its top level does
    "ended",  # the program's process ended before it answered
    "cpu",  # as before, at its limit of processor time
    "timeout",  # the wall clock ran out
    "not plain",  # it answered with something that is no plain value, or is too large
    "unchecked",  # the test could not do its work: it called nothing, or with what is no plain value
]


class Limits(Settings):
    """What one program may use. Its tests, in a process of their own, have the same limits."""

    wall_seconds: float = Field(default=15.0, gt=0)
    """From the start of its process to the end of its tests."""
    cpu_seconds: int = Field(default=5, ge=1)
    memory_mib: int = Field(default=512, ge=64)
    """Address space of a process."""
    scratch_mib: int = Field(default=16, ge=1)
    """Files in its scratch folder, and the size of each."""
    processes: int = Field(default=16, ge=1)
    """Threads; processes too where no filter of system calls forbids them."""
    open_files: int = Field(default=64, ge=16)
    answer_mib: int = Field(default=8, ge=1)
    """One answer to its tests, encoded."""


@dataclass(frozen=True, slots=True)
class Program:
    """Hold a program and what it is judged by."""

    source: str
    entry_point: str
    """The function that the test calls, by this name or as `candidate`."""
    test: str
    """Source that defines `check(candidate)`, or asserts as it is executed."""
    helpers: str = ""
    """Source that the test may use, from whoever wrote the test: never the program's own."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hold what became of a program."""

    reason: Reason
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


@dataclass(frozen=True, slots=True)
class Isolation:
    """Hold the walls that stand around a program, and why others do not."""

    layers: tuple[str, ...]
    missing: tuple[tuple[str, str], ...] = ()
    """Layer and reason."""

    def __str__(self) -> str:
        on = ", ".join((*self.layers, "no new privileges", "resource limits"))
        lacking = "; ".join(f"{layer} ({why})" for layer, why in self.missing)
        return on + (f"; without {lacking}" if lacking else "")
