"""Detect which isolation layers this machine offers."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from functools import cache

from cdm_toolkit.errors import IsolationMissing
from cdm_toolkit.evaluation.sandbox.execute import SetupError, run_program
from cdm_toolkit.evaluation.sandbox.records import CGROUP, LAYERS, Isolation, Program

NAMESPACES = LAYERS[:6]
TRIAL = Program("def answer(n):\n    return [n]\n", "answer", "assert answer(41) == [41]")


@cache
def probe() -> Isolation:
    """Detect the layers by running a trial program with them, starting with all of them.

    Raises IsolationMissing where not even a process with resource limits works.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise IsolationMissing("everything", f"it is {sys.platform} on {platform.machine()}")
    problems: dict[str, str] = {}
    for layers in _combinations():
        if (problem := _try(layers)) is None:
            missing = tuple((layer, problems[layer]) for layer in LAYERS if layer not in layers)
            if (problem := _try((*layers, CGROUP))) is None:
                return Isolation((*layers, CGROUP), missing)
            return Isolation(layers, (*missing, (CGROUP, problem)))
        for layer in layers:
            problems.setdefault(layer, problem)
    raise IsolationMissing("everything", problems.get("", next(iter(problems.values()))))


def require(isolation: Isolation) -> None:
    """Raise IsolationMissing where layers are missing; it names all of them. A control group is not required."""
    missing = [(layer, why) for layer, why in isolation.missing if layer != CGROUP]
    if missing:
        lacking = ", ".join(layer for layer, _ in missing)
        raise IsolationMissing(lacking, "; ".join(sorted({why for _, why in missing})))


def _try(layers: tuple[str, ...]) -> str | None:
    """Run the trial program; return why the layers cannot be set up, if so."""
    try:
        outcome = run_program(TRIAL, isolation=Isolation(layers))
    except SetupError as error:
        return str(error)
    if not outcome.passed:
        raise IsolationMissing("a process that works", f"a trial {outcome.reason}: {outcome.detail}")
    return None


def _combinations() -> Iterator[tuple[str, ...]]:
    """Yield the combinations to try: all namespaces or none, as each protects the others, with the two filters."""
    groups = [NAMESPACES, *([NAMESPACES[1:]] if os.geteuid() == 0 else []), ()]
    for namespaces in groups:
        for filters in (("landlock", "seccomp"), ("seccomp",), ("landlock",), ()):
            yield (*namespaces, *filters)
