"""`cdm eval`: score models side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdm_toolkit.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from cdm_toolkit.evaluation.results import SuiteResult

app = typer.Typer(help="Score models: GSM8K through lm-eval, bits per byte, and the suites of your own.")


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    suite: Annotated[
        str | None, typer.Option(help="A suite (cdm eval list), or the path of a YAML file.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="An alias, a folder or a hub id. Again for each further model.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="JSONL file to score, instead of the suite's own data.")
    ] = None,
    fewshot_data: Annotated[
        Path | None, typer.Option(help="JSONL file that few-shot examples are drawn from.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first rows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that a model reads at once.")] = 8,
    device: options.Device = "cpu",
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
    from cdm_toolkit.evaluation.run import Ask
    from cdm_toolkit.evaluation.run import evaluate as score

    with _progress() as follow:
        results = score(
            suite,
            model,
            ask=Ask(data=data, fewshot_data=fewshot_data, limit=limit),
            device=device,
            batch_size=batch_size,
            progress=follow,
        )
    if as_json:
        screen.print_json([asdict(result) for result in results])
        return
    _print_results(results)


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


@contextmanager
def _progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    from cdm_toolkit.cli import screen

    with screen.progress() as bar:

        def follow(name: str) -> Callable[[int, int], None]:
            task = bar.add_task(name, total=None, note="")
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield follow


def _print_results(results: list[SuiteResult]) -> None:
    from cdm_toolkit.cli import screen

    first = results[0]
    console = screen.out()
    metrics = [score.metric for score in first.scores]
    shown = screen.table(
        f"{first.suite}: {first.data}, {first.setting}",
        "model",
        *metrics,
        "n",
        "seconds",
        right=(*metrics, "n", "seconds"),
    )
    for result in results:
        cells = [
            f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
            for score in result.scores
        ]
        seconds = max(score.seconds for score in result.scores)
        shown.add_row(result.model, *cells, f"{result.scores[0].n}", f"{seconds:.1f}")
    console.print(shown)
    for result in results:
        for note in result.notes:
            screen.warn(f"{result.model}: {note}")
