"""Detect which isolation layers this machine offers."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from functools import cache

from cdm_toolkit.errors import IsolationMissing
from cdm_toolkit.evaluation.sandbox.execute import SetupError, run_program
from cdm_toolkit.evaluation.sandbox.records import LAYERS, Isolation, Program

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
        try:
            outcome = run_program(TRIAL, isolation=Isolation(layers))
        except SetupError as error:
            for layer in layers:
                problems.setdefault(layer, str(error))
            continue
        if not outcome.passed:
            raise IsolationMissing("a process that works", f"a trial {outcome.reason}: {outcome.detail}")
        missing = tuple((layer, problems[layer]) for layer in LAYERS if layer not in layers)
        return Isolation(layers, missing)
    raise IsolationMissing("everything", problems.get("", next(iter(problems.values()))))


def require(isolation: Isolation) -> None:
    """Raise IsolationMissing where layers are missing; it names all of them."""
    if isolation.missing:
        lacking = ", ".join(layer for layer, _ in isolation.missing)
        raise IsolationMissing(lacking, "; ".join(sorted({why for _, why in isolation.missing})))


def _combinations() -> Iterator[tuple[str, ...]]:
    """Yield the combinations to try: all namespaces or none, as each protects the others, with the two filters."""
    groups = [NAMESPACES, *([NAMESPACES[1:]] if os.geteuid() == 0 else []), ()]
    for namespaces in groups:
        for filters in (("landlock", "seccomp"), ("seccomp",), ("landlock",), ()):
            yield (*namespaces, *filters)
