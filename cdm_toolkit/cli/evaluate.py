"""`cdm eval`: score models side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdm_toolkit.cli import completion, options
from cdm_toolkit.cli.settings_options import record_option

if TYPE_CHECKING:
    from rich.table import Table

    from cdm_toolkit.evaluation.evaluate import Evaluation, Follow, Progress
    from cdm_toolkit.evaluation.scores import Score, SuiteResult

_option = partial(record_option, "evaluation/evaluate.py", "Ask")

app = typer.Typer(
    help="Score models: lm-eval's tasks, generated code, instructions, bits per byte, suites of your own."
)


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(
            help="A suite (cdm eval list), the path of a YAML file, or all.", autocompletion=completion.suites
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="An alias, a folder or a hub id. Repeat for more models.", autocompletion=completion.models
        ),
    ] = None,
    data: Annotated[Path | None, _option("data")] = None,
    fewshot_data: Annotated[Path | None, _option("fewshot_data")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="A task or data set of the suite. Repeat for more, or separate with commas."),
    ] = None,
    include_path: Annotated[Path | None, _option("include_path")] = None,
    limit: Annotated[int | None, _option("limit")] = None,
    chat_template: Annotated[bool, _option("chat_template", "--chat-template")] = False,
    batch_size: Annotated[str, typer.Option(help="Rows per batch; auto: by their length.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the finished items; an interrupted run resumes from it."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard the items in --output.")] = False,
    allow_code_execution: Annotated[bool, _option("allow_code_execution", "--allow-code-execution")] = False,
    require_isolation: Annotated[bool, _option("require_isolation", "--require-isolation")] = False,
    workers: options.Workers = 1,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Score models side by side on a suite.

    Example: cdm eval --suite math --model out --data gsm8k_test.jsonl --limit 20
    """
    if context.invoked_subcommand is not None:
        return
    if not suite or not model:
        missing = "--suite" if not suite else "--model"
        raise typer.BadParameter("name a suite and at least one model", param_hint=missing, ctx=context)
    from cdm_toolkit.cli import screen
    from cdm_toolkit.evaluation.evaluate import Ask
    from cdm_toolkit.evaluation.evaluate import evaluate as score
    from cdm_toolkit.hub.models import resolve_device

    given = {field.name: context.params[field.name] for field in fields(Ask)}
    given["tasks"] = tuple(name for each in tasks or () for name in each.split(",") if name)
    ask = Ask(**given | {"batch_size": _batch_size(batch_size)})
    device = str(resolve_device(device))
    with _progress() as follow:
        done = score(
            suite,
            model,
            ask=ask,
            device=device,
            output=output,
            overwrite=overwrite,
            follow=follow,
            on_load=cache(lambda: screen.say_device(device)),  # once, however many models
            go_on=screen.this_command("--overwrite"),
        )
    if as_json:
        screen.print_json({**_as_json(done), "device": device})
        return
    _print(done, output)


@app.command("list")
def list_suites(as_json: options.AsJson = False) -> None:
    """List the suites, with what each measures."""
    from cdm_toolkit.cli import screen
    from cdm_toolkit.evaluation.suites import load_suite, suite_names

    specs = [load_suite(name) for name in suite_names()]
    if as_json:
        screen.print_json([{"suite": s.name, "summary": s.summary, "file": str(s.path)} for s in specs])
        return
    shown = screen.table(None, "suite", "what it measures", "file")
    for spec in specs:
        shown.add_row(spec.name, spec.summary, str(spec.path))
    screen.out().print(shown)


def _batch_size(given: str) -> int | None:
    """Read a number of rows, or None for auto."""
    from cdm_toolkit.errors import BadOption

    if given == "auto":
        return None
    if not given.isdecimal():
        raise BadOption("--batch-size", given, "a number of at least 1, or auto")
    return int(given)


@contextmanager
def _progress() -> Iterator[Follow]:
    from cdm_toolkit.cli import screen

    with screen.progress() as bar:

        def follow(suite: str, model: str) -> Progress:
            task = bar.add_task(f"{suite}: {model}", total=None, note="")
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield follow


def _as_json(done: Evaluation) -> dict[str, object]:
    from cdm_toolkit.cli.translate_messages import in_terminal

    return {
        "results": [asdict(result) for result in done.results],
        "skipped": [{"suite": each.suite, "reason": in_terminal(each.reason)} for each in done.skipped],
    }


def _print(done: Evaluation, output: Path | None) -> None:
    from cdm_toolkit.cli import screen

    for suite, grouped in groupby(done.results, key=lambda result: result.suite):
        results = list(grouped)
        screen.out().print(_table(suite, results))
        for result in results:
            for note in result.notes:
                screen.warn(f"{suite}, {result.model}: {note}")
            if result.resumed:
                screen.say(f"{suite}, {result.model}: {result.resumed} items were there already")
    for each in done.skipped:
        screen.warn(f"the suite {each.suite} was left out: {each.reason}")
    if output is not None:
        screen.say(f"items, generations and their provenance are in {output}")


def _table(suite: str, results: list[SuiteResult]) -> Table:
    """Make a table with a row per model."""
    from cdm_toolkit.cli import screen

    first = results[0]
    metrics = [score.metric for score in first.scores]
    right = (*metrics, "n", "seconds")
    shown = screen.table(f"{suite}: {first.data}, {first.setting}", "model", *right, right=right)
    for result in results:
        counts = dict.fromkeys(str(score.n) for score in result.scores)
        cells = [_cell(score) for score in result.scores]
        shown.add_row(result.model, *cells, "/".join(counts), f"{result.seconds:.1f}")
    return shown


def _cell(score: Score) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
