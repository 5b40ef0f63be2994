"""`cdm distill`: train a student on a teacher."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdm_toolkit.cli import options

if TYPE_CHECKING:
    from cdm_toolkit.distill.run import Progress, RunResult
    from cdm_toolkit.distill.trainer import StepLog


def distill(
    student: Annotated[str, typer.Option(help="The model to train: an alias, a folder or a hub id.")],
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL with prompt and completion, question and answer, messages, or text in each row."
        ),
    ],
    output: options.OutputFolder,
    teacher: Annotated[str | None, typer.Option(help="The model to learn from. Not needed by sft.")] = None,
    method: Annotated[str, typer.Option(help="cdm, or sft for plain fine-tuning.")] = "cdm",
    preset: Annotated[str | None, typer.Option(help="paper: the settings of arXiv 2502.11104.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of cross-entropy; KD has the rest.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both distributions in KD.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Candidates of each model at a position.")] = None,
    theta: Annotated[
        float | None, typer.Option(help="Near tokens: edit distance below this part of both lengths.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="boundary: shared context. mean: the paper's.")
    ] = None,
    aligner: Annotated[str | None, typer.Option(help="anchored, bytes, entropy-dtw or dtw.")] = None,
    both_directions: Annotated[
        bool | None,
        typer.Option(
            "--both-directions/--one-direction", help="Take the near tokens of the student's ids too."
        ),
    ] = None,
    exact_always: Annotated[
        bool | None,
        typer.Option(
            "--exact-always/--top-k-only", help="Pair equal bytes even outside the student's top k."
        ),
    ] = None,
    rest_bucket: Annotated[
        bool | None,
        typer.Option("--rest-bucket/--no-rest-bucket", help="Count unmatched probability as one outcome."),
    ] = None,
    guards: Annotated[
        bool | None,
        typer.Option("--guards/--no-guards", help="Match no tokens whose digits or operators differ."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; goes before --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step and device.")] = None,
    grad_accumulation: Annotated[int | None, typer.Option(help="Batches a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at its highest.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps in which the learning rate rises.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a row, on either side; more are cut.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, or bfloat16 for mixed precision.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; 0 writes none.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between two lines of the log.")] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    workers: options.Workers = 1,
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a student on a teacher that may have another tokenizer.

    Example: cdm distill --teacher smollm2 --student student --data rows.jsonl --output out
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.distill.config import from_mapping, paper
    from cdm_toolkit.distill.run import run
    from cdm_toolkit.errors import UnknownName

    if preset not in (None, "paper"):
        raise UnknownName("preset", str(preset), ["paper"])
    said = {
        "teacher": teacher,
        "alpha": alpha,
        "temperature": temperature,
        "top_k": top_k,
        "theta": theta,
        "positions": positions,
        "aligner": aligner,
        "both_directions": both_directions,
        "exact_always": exact_always,
        "rest_bucket": rest_bucket,
        "guards": guards,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "grad_accumulation": grad_accumulation,
        "learning_rate": lr,
        "warmup_steps": warmup_steps,
        "max_length": max_length,
        "dtype": dtype,
        "save_every": save_every,
        "log_every": log_every,
    }
    settings = {name: value for name, value in said.items() if value is not None}
    make = paper if preset == "paper" else from_mapping
    config = make(
        settings
        | {"student": student, "data": str(data), "output": str(output), "method": method, "seed": seed}
        | {"device": device, "workers": workers, "overwrite": overwrite, "resume": resume}
    )
    with _TrainingScreen() as shown:
        result = run(config, on_progress=shown.follow)
    if as_json:
        screen.print_json(_record(result))
        return
    for warning in result.warnings:
        screen.warn(warning)
    _print_result(result)


class _TrainingScreen:
    """Draw the stages of a run, and a line of the log now and then."""

    def __init__(self) -> None:
        from cdm_toolkit.cli import screen

        self._bar = screen.progress()
        self._console = self._bar.console
        self._tasks: dict[str, int] = {}
        self._last: StepLog | None = None

    def __enter__(self) -> _TrainingScreen:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)  # type: ignore[arg-type]

    def follow(self, progress: Progress) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bar.add_task(
                _STAGES[progress.stage], total=progress.total, note=""
            )
        task = self._tasks[progress.stage]
        self._bar.update(task, completed=progress.done, total=progress.total)
        if progress.log is not None and progress.log is not self._last:
            self._last = progress.log
            self._console.print(_log_line(progress.log), markup=False, soft_wrap=True, style="dim")


_STAGES = {
    "align": "aligning rows",
    "load": "loading models",
    "neighbours": "near tokens",
    "train": "training",
    "save": "saving",
}


def _log_line(log: StepLog) -> str:
    parts = [f"step {log.step:>5}", f"loss {log.loss:.4f}", f"CE {log.ce:.4f}"]
    if log.pairs:
        parts += [
            f"KD {log.kd:.4f}",
            f"matched mass {log.matched_mass:.1%}",
            f"aligned {log.aligned_share:.1%}",
        ]
    return "   ".join([*parts, f"lr {log.learning_rate:.1e}"])


def _print_result(result: RunResult) -> None:
    from cdm_toolkit.cli import screen

    shown = screen.table(None, "what", "figure")
    first, last = result.losses[0], result.losses[-1]
    shown.add_row("student", str(result.output))
    shown.add_row("rows", str(result.rows))
    shown.add_row("steps", f"{result.steps:,}")
    shown.add_row("CE, nats a token", f"{first.ce:.4f} → {last.ce:.4f}")
    if last.pairs:
        shown.add_row("KD, nats a position", f"{first.kd:.4f} → {last.kd:.4f}")
        shown.add_row("matched mass", f"{last.matched_mass:.1%}")
        shown.add_row("aligned share", f"{last.aligned_share:.1%} of the student's labels")
    shown.add_row("time", f"{result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s in training")
    screen.out().print(shown, markup=False)


def _record(result: RunResult) -> dict[str, object]:
    return asdict(result) | {"output": str(result.output), "tokens_per_second": result.tokens_per_second}
