"""Output streams: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cdm_toolkit.cli.translate_messages import in_terminal

PLAIN_WIDTH = 120
"""Width of output that is not a terminal, so that tables in files are not truncated."""


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def out() -> Console:
    """Return the console for results."""
    return _console(stderr=False)


def err() -> Console:
    """Return the console for progress and messages."""
    return _console(stderr=True)


def line(text: str) -> None:
    """Print one line of an answer, as it is."""
    out().print(text, markup=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a message on stderr."""
    err().print(message, style="dim", markup=False, soft_wrap=True)


def say_device(device: str) -> None:
    """Say which device a model runs on: it is chosen where --device is auto."""
    say(f"device: {device}")


def warn(message: str) -> None:
    """Print one warning, the library's in the words of the command that runs."""
    err().print(f"note: {in_terminal(message)}", style="yellow", markup=False, soft_wrap=True)


def this_command(*without: str) -> str:
    """Write the command line that runs, without some of its options."""
    return shlex.join(["cdm", *(word for word in sys.argv[1:] if word not in without)])


def print_json(answer: object) -> None:
    """Print an answer as JSON, on one line, in UTF-8."""
    print(json.dumps(answer, ensure_ascii=False))  # noqa: T201


def table(title: str | None, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """Make a table; `right` are the right-aligned columns."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def print_table(
    title: str | None, columns: Sequence[str], rows: Iterable[Iterable[str]], *, right: tuple[str, ...] = ()
) -> None:
    """Print a table of an answer; `right` are the right-aligned columns."""
    shown = table(title, *columns, right=right)
    for row in rows:
        shown.add_row(*row)
    out().print(shown, markup=False)


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of one thing; what is given is called with (done, total)."""
    with progress() as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress() -> Progress:
    """Make a transient progress display on stderr, which is disabled if stderr is not a terminal."""
    console = err()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
