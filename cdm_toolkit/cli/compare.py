"""`cdm compare`: train several methods on equal terms, evaluate them, and test which is better."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdm_toolkit.cli import completion, options
from cdm_toolkit.cli.distill import STAGES

if TYPE_CHECKING:
    from cdm_toolkit.compare.runner import Failure, Progress, Running
    from cdm_toolkit.compare.study import StudyConfig
    from cdm_toolkit.compare.study_folder import StudyFolder
    from cdm_toolkit.compare.types import Cell


def compare(
    study: Annotated[
        str | None,
        typer.Argument(
            help="A study file (YAML), or the name of a shipped one.", autocompletion=completion.studies
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the finished cells; an interrupted study resumes from it. Default: <study>-output.",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any setting of a study, such as steps=20 or train.gsm8k.path=rows.jsonl. Repeat for more.",
        ),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(help="Run only this cell, by number or name, in this process: for several machines."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of cells to run in parallel.", min=1)] = 1,
    list_cells: Annotated[
        bool,
        typer.Option("--list", help="List the cells with their numbers and states, without running any."),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Report the finished cells, without running any.")
    ] = False,
    keep_models: Annotated[
        bool,
        typer.Option(
            "--keep-models",
            help="Keep the student of each cell; by default it is deleted after the evaluation.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Discard the results in --output; with --cell, only of that cell."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train all methods of a study on the same rows, steps and seeds, and measure them on held-out text.

    A cell is one method with one seed. Finished cells are kept: run the same command again to resume.

    Examples:

    cdm compare quickstart-small --workers 2

    cdm compare study.yaml -o out --set steps=20 --list
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.compare.figures import require_matplotlib
    from cdm_toolkit.compare.study import from_file, grid
    from cdm_toolkit.compare.study_folder import StudyFolder

    _check_options(study, {"--cell": cell is not None, "--list": list_cells, "--report": report}, overwrite)
    assert study is not None
    config = from_file(study, assignments or [])
    folder = StudyFolder(output or Path(f"{config.name}-output"))
    command = _command(study, output, assignments or [])
    if list_cells:
        _list(config, folder, as_json)
    elif report:
        require_matplotlib()
        folder.check(config)
        _report(config, folder, command, as_json)
    elif cell is not None:
        _run_one(config, folder, cell, command, keep_models=keep_models, overwrite=overwrite, as_json=as_json)
    else:
        require_matplotlib()
        _check_texts(config, folder)
        if not overwrite:
            folder.check(config)
            folder.read_cells(config, grid(config))
        folder.claim(config, overwrite=overwrite)
        failures = _run_all(config, folder, workers, keep_models=keep_models, quiet=as_json)
        if folder.read_cells(config, grid(config)):
            _report(config, folder, command, as_json)
        _raise_for(failures, folder, command)
        if not as_json:
            screen.say(f"{folder.path} keeps all of it: the same command draws it again")


def _check_options(study: str | None, ways: Mapping[str, bool], overwrite: bool) -> None:
    from cdm_toolkit.compare.study import list_studies
    from cdm_toolkit.errors import CdmError, TwoWays

    if study is None:
        names = ", ".join(list_studies())
        raise CdmError(
            "no study is named", fix=f"give the path of a study file, or one that is here: {names}"
        )
    first, *others = [name for name, wanted in ways.items() if wanted] or [""]
    if others:
        raise TwoWays(first, others[0])
    if overwrite and first in ("--list", "--report"):
        raise TwoWays("--overwrite", first)


def _check_texts(config: StudyConfig, folder: StudyFolder) -> None:
    """Check that the texts of a study can be read, before the output folder is created."""
    from cdm_toolkit.compare.prepared import read_texts

    if not folder.study_file.is_file():
        read_texts(config)


def _command(study: str, output: Path | None, assignments: Sequence[str]) -> str:
    """Return the command line of the whole study, without options such as --cell."""
    words = ["cdm", "compare", study, *([] if output is None else ["-o", str(output)])]
    return shlex.join([*words, *(word for each in assignments for word in ("--set", each))])


# Running


def _run_all(
    config: StudyConfig, folder: StudyFolder, workers: int, *, keep_models: bool, quiet: bool
) -> list[Failure]:
    from cdm_toolkit.cli import screen
    from cdm_toolkit.compare.runner import run_study

    shown = _Display(quiet)
    with shown.bar:
        return run_study(
            config,
            folder,
            workers=workers,
            keep_models=keep_models,
            go_on=screen.this_command("--overwrite"),
            say=screen.say,
            on_stage=shown.prepare,
            on_progress=shown.follow,
        )


def _run_one(
    config: StudyConfig,
    folder: StudyFolder,
    which: str,
    command: str,
    *,
    keep_models: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from cdm_toolkit.cli import screen
    from cdm_toolkit.compare.runner import run_cell
    from cdm_toolkit.compare.study import cell_at

    number = cell_at(config, which).index
    _check_texts(config, folder)
    folder.claim(config)
    shown = _Display(quiet=True)
    with shown.bar:
        result = run_cell(
            config,
            folder,
            number,
            overwrite=overwrite,
            keep_models=keep_models,
            go_on=f"{command} --cell {number}",
            say=screen.say,
            on_stage=shown.prepare,
        )
    if as_json:
        screen.print_json(asdict(result))
        return
    line = f"{_named(result.cell)}: {result.steps} steps of {result.step_seconds:.2f} s"
    screen.out().print(f"{line}; put together with: {command} --report", markup=False, soft_wrap=True)


def _raise_for(failures: Sequence[Failure], folder: StudyFolder, command: str) -> None:
    """Raise CdmError if cells have failed."""
    from cdm_toolkit.errors import CdmError

    if not failures:
        return
    named = "; ".join(f"{_named(failure.cell)}: {failure.why}" for failure in failures)
    many = f"{len(failures)} cells" if len(failures) > 1 else "a cell"
    again = f"{command} --cell {failures[0].cell.index}"
    raise CdmError(
        f"{many} failed: {named}",
        fix=f"see log.txt in {folder.of(failures[0].cell)}, run it again with: {again}",
    )


def _named(cell: Cell) -> str:
    alpha = f", alpha {cell.alpha:g}" if cell.in_curve else ""
    return f"cell {cell.index} ({cell.method}{alpha}, seed {cell.seed})"


_STAGES = {**STAGES, "start": "starting", "measure": "measuring"}


class _Display:
    """Progress of a study: a bar for all cells and one for each that runs, and a line for each that ends."""

    def __init__(self, quiet: bool) -> None:
        from cdm_toolkit.cli import screen

        self.bar = screen.progress()
        self._quiet = quiet
        self._tasks: dict[str, Any] = {}

    def prepare(self, stage: str, done: int, total: int) -> None:
        self._show({_STAGES.get(stage, stage): (done, total, "")})

    def follow(self, progress: Progress) -> None:
        running = {
            _named(each.cell): (each.done, each.total, _STAGES.get(each.stage, each.stage))
            for each in progress.running
        }
        done = progress.done + sum(map(_share_done, progress.running))  # for the time that is left
        self._show({"cells": (done, progress.planned, "")} | running)
        if not self._quiet and progress.ended:
            self.bar.console.print(_ended(progress), markup=False, soft_wrap=True, style="dim")

    def _show(self, rows: Mapping[str, tuple[float, int, str]]) -> None:
        for name in self._tasks.keys() - rows.keys():
            self.bar.remove_task(self._tasks.pop(name))
        for name, (done, total, note) in rows.items():
            if name not in self._tasks:
                self._tasks[name] = self.bar.add_task(name, total=total, completed=int(done), note=note)
            self.bar.update(self._tasks[name], completed=done, total=total, note=note)


def _share_done(running: Running) -> float:
    """Estimate the finished share of a cell, most of whose time is training."""
    shares = {"train": running.done / max(running.total, 1), "save": 1.0, "measure": 1.0}
    return 0.9 * shares.get(running.stage, 0.0)


def _ended(progress: Progress) -> str:
    from cdm_toolkit.compare.runner import Failure

    ended = progress.ended
    assert ended is not None
    if isinstance(ended, Failure):
        return f"{_named(ended.cell)} failed: {ended.why}"
    done = f"{progress.done} of {progress.planned}"
    return f"{_named(ended.cell)} is done, {ended.step_seconds:.2f} s a step; {done}"


# What came out


def _report(config: StudyConfig, folder: StudyFolder, command: str, as_json: bool) -> None:
    """Merge the finished cells, write results, figures and page, and print the table."""
    from cdm_toolkit.cli import screen
    from cdm_toolkit.cli.compare_table import table
    from cdm_toolkit.compare.figures import draw
    from cdm_toolkit.compare.results import put_together, uneven
    from cdm_toolkit.compare.study_folder import PAGE_FILE
    from cdm_toolkit.compare.study_page import write_page
    from cdm_toolkit.compare.summary import results_record

    result = put_together(config, folder, command=command)
    page, figures = folder.path / PAGE_FILE, folder.write_results(results_record(result))
    written = [page, figures, *draw(result, folder.path)]
    write_page(result, page)
    for line in uneven(result.cells):
        screen.warn(f"{line}: this is no equal comparison")
    if as_json:
        print(figures.read_text(encoding="utf-8"), end="")  # noqa: T201
        return
    screen.out().print(table(result))
    for file in written:
        screen.out().print(str(file), markup=False, soft_wrap=True)


def _list(config: StudyConfig, folder: StudyFolder, as_json: bool) -> None:
    from dataclasses import asdict

    from cdm_toolkit.cli import screen
    from cdm_toolkit.compare.study import grid

    folder.check(config)
    states = [(cell, _state(config, folder, cell)) for cell in grid(config)]
    if as_json:
        rows = ({"cell": each.index, **asdict(each), "state": state} for each, state in states)
        screen.print_json([{name: value for name, value in row.items() if name != "index"} for row in rows])
        return
    shown = screen.table(None, "cell", "method", "α", "seed", "state", right=("cell", "α", "seed"))
    for each, state in states:
        line = " (line over α)" if each.in_curve else ""
        shown.add_row(str(each.index), each.method + line, f"{each.alpha:g}", str(each.seed), state)
    screen.out().print(shown, markup=False)
    done = sum(state == "done" for _, state in states)
    screen.say(f"{done} of {len(states)} cells are done in {folder.path}")


def _state(config: StudyConfig, folder: StudyFolder, cell: Cell) -> str:
    """Return the state of a cell for display."""
    from cdm_toolkit.cli import screen
    from cdm_toolkit.compare.runner import running_cell
    from cdm_toolkit.compare.study_folder import LOG_FILE
    from cdm_toolkit.errors import BadArtifact

    try:
        if folder.read_cell(config, cell) is not None:
            return "done"
    except BadArtifact as fault:
        screen.warn(str(fault))
        return "unusable"
    if begun := running_cell(folder, cell):
        return f"{_STAGES.get(begun.stage, begun.stage)}, {begun.done} of {begun.total}"
    log = folder.of(cell) / LOG_FILE
    return "stopped" if log.is_file() and not log.stat().st_size else "failed" if log.is_file() else ""
