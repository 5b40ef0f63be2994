"""Time things in turns, and show what came out."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Line:
    """A figure, and what it should be at most (or at least)."""

    what: str
    value: float
    unit: str = "ms"
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool | None:
        if self.at_most is None and self.at_least is None:
            return None
        low, high = self.at_least, self.at_most
        return (low is None or low <= self.value) and (high is None or self.value <= high)


@dataclass(frozen=True, slots=True)
class Grid:
    """Many figures in one table; None is a cell without."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[float | str | None]]


@dataclass(frozen=True, slots=True)
class Report:
    """What a benchmark found; `facts` say what was measured on."""

    title: str
    facts: Mapping[str, Any]
    lines: list[Line] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)


def medians(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time calls in turns, after one untimed call of each; the median of each, in milliseconds.

    `time.thread_time` as the clock leaves out what other processes take from this one.
    """
    for call in contestants.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            started = clock()
            call()
            taken[name].append(1e3 * (clock() - started))
    return {name: median(times) for name, times in taken.items()}


def once(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one call, in milliseconds: for what is too slow to repeat."""
    started = clock()
    call()
    return 1e3 * (clock() - started)


def machine() -> dict[str, Any]:
    """Say on what and with what it was measured."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "numba", "rapidfuzz", "tokenizers", "torch")},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def record(report: Report) -> dict[str, Any]:
    """Give a report as plain values."""
    lines = [asdict(line) | {"holds": line.holds} for line in report.lines]
    found = {"title": report.title, "machine": machine(), "facts": dict(report.facts), "lines": lines}
    return found | {"grids": [asdict(grid) for grid in report.grids]} if report.grids else found


def draw(report: Report) -> None:
    """Show a report as a table, and what it was measured on beneath."""
    table = Table(title=report.title, title_justify="left")
    for heading, justify in (("", "left"), ("figure", "right"), ("unit", "left"), ("wanted", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for line in report.lines:
        table.add_row(line.what, f"{line.value:,.4g}", line.unit, _wanted(line))
    console = Console()
    console.print(table)
    for grid in report.grids:
        drawn = Table(*grid.columns, title=grid.title, title_justify="left")
        for row in grid.rows:
            drawn.add_row(*map(_cell, row))
        console.print(drawn)
    for name, fact in {**report.facts, **machine()}.items():
        console.print(f"[dim]{name}: {fact}[/]", highlight=False)


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def _wanted(line: Line) -> str:
    bounds = (("≤", line.at_most), ("≥", line.at_least))
    mark = {True: " [green]holds[/]", False: " [red]does not hold[/]", None: ""}[line.holds]
    return " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None) + mark
