"""`cdm distill`: train a student on its teachers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from cdm_toolkit.cli import completion, options

if TYPE_CHECKING:
    from cdm_toolkit.distill.plan import Plan
    from cdm_toolkit.distill.prepare import Progress
    from cdm_toolkit.distill.run import RunResult
    from cdm_toolkit.distill.settings import DistillConfig
    from cdm_toolkit.distill.trainer import StepLog

_RUN, _KD, _TRAIN = "The run", "Distillation (of the first teacher)", "Training"


def _option(
    help: str,
    panel: str,
    default: str | None = None,
    names: Callable[[], completion.Completions] | None = None,
) -> Any:
    """Make an option; `default` is what a run has without it and without a run file, `names` complete it."""
    return typer.Option(help=help, rich_help_panel=panel, show_default=default or False, autocompletion=names)


def distill(
    run_file: Annotated[
        str | None,
        typer.Argument(
            help="A run file (YAML), or the name of a recipe (cdm recipes list). Options go over it.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    student: Annotated[
        str | None,
        _option("The model to train: an alias, a folder or a hub id.", _RUN, names=completion.models),
    ] = None,
    teacher: Annotated[
        str | None, _option("The model to learn from. Not needed by sft.", _RUN, names=completion.models)
    ] = None,
    teacher_cache: Annotated[
        Path | None, _option("Folder of cdm teacher cache, instead of the teacher in memory.", _RUN)
    ] = None,
    data: Annotated[
        Path | None,
        _option("JSONL with prompt and completion, question and answer, messages, or text in a row.", _RUN),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=_RUN)
    ] = None,
    preset: Annotated[str | None, _option("paper: the settings of arXiv 2502.11104.", _RUN)] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any setting of a run file, such as train.lr=2e-5 or teachers.0.top_k=400. Again for more.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option(
            "What is learned from the teacher; sft: nothing.", _KD, "spelling", completion.methods_or_none
        ),
    ] = None,
    alpha: Annotated[float | None, _option("Weight of cross-entropy; KD has the rest.", _KD, "0.8")] = None,
    temperature: Annotated[float | None, _option("Of both distributions.", _KD, "1.0")] = None,
    top_k: Annotated[int | None, _option("Candidates of each model at a position.", _KD, "100")] = None,
    max_edit_distance: Annotated[
        float | None,
        _option("Of cdm: near ids have an edit distance below this share of both lengths.", _KD, "0.3"),
    ] = None,
    positions: Annotated[
        str | None,
        _option(
            "boundary: logits at the shared boundary. mean: the mean over a group, as in the paper.",
            _KD,
            "boundary",
        ),
    ] = None,
    aligner: Annotated[str | None, _option("anchored, bytes, entropy-dtw or dtw.", _KD, "anchored")] = None,
    epochs: Annotated[float | None, _option("Passes over the data.", _TRAIN, "1.0")] = None,
    max_steps: Annotated[int | None, _option("Optimizer steps; goes before --epochs.", _TRAIN)] = None,
    batch_size: Annotated[int | None, _option("Rows per batch and device.", _TRAIN, "8")] = None,
    grad_accumulation: Annotated[int | None, _option("Batches per optimizer step.", _TRAIN, "1")] = None,
    lr: Annotated[float | None, _option("Peak learning rate.", _TRAIN, "2e-05")] = None,
    max_length: Annotated[
        int | None, _option("Tokens of a row, on any side; more are cut.", _TRAIN, "512")
    ] = None,
    template: Annotated[
        str | None, _option("none, or chat: each side reads rows by its own chat template.", _TRAIN, "none")
    ] = None,
    dtype: Annotated[
        str | None, _option("float32, or bfloat16 for mixed precision.", _TRAIN, "float32")
    ] = None,
    lora_rank: Annotated[int | None, _option("Train adapters of this rank.", _TRAIN)] = None,
    seed: Annotated[int | None, _option("Random seed.", _TRAIN, "0")] = None,
    device: Annotated[
        str | None, _option("auto (a GPU where there is one), cpu, cuda or mps.", _TRAIN, "auto")
    ] = None,
    workers: Annotated[int | None, _option("Processes that tokenize and align.", _TRAIN, "1")] = None,
    log_every: Annotated[int | None, _option("Steps between two lines of the log.", _TRAIN, "10")] = None,
    save_every: Annotated[
        int | None, _option("Steps between checkpoints; 0 writes none.", _TRAIN, "500")
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard", help="Write event files.", rich_help_panel=_TRAIN)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve everything, print the plan, train nothing.")
    ] = False,
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a student on teachers that may have other tokenizers.

    Examples:

    cdm distill --teacher smollm2 --student student --data rows.jsonl --output out

    cdm distill run.yaml --set train.lr=1e-4 --dry-run
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.distill.plan import plan
    from cdm_toolkit.distill.run import run
    from cdm_toolkit.errors import TwoWays

    if overwrite and resume:
        raise TwoWays("--overwrite", "--resume")
    said = {
        "student": student,
        "data.path": data,
        "data.max_length": max_length,
        "data.template": template,
        "data.workers": workers,
        "output": output,
        "preset": preset,
        "alpha": alpha,
        "teachers.0.model": teacher,
        "teachers.0.cache": teacher_cache,
        "teachers.0.method": None if method == "sft" else method,
        "teachers.0.temperature": temperature,
        "teachers.0.top_k": top_k,
        "teachers.0.max_edit_distance": max_edit_distance,
        "teachers.0.positions": positions,
        "teachers.0.aligner": aligner,
        "train.epochs": epochs,
        "train.max_steps": max_steps,
        "train.batch_size": batch_size,
        "train.grad_accumulation": grad_accumulation,
        "train.lr": lr,
        "train.dtype": dtype,
        "train.lora.rank": lora_rank,
        "train.seed": seed,
        "train.device": device,
        "train.log_every": log_every,
        "train.save_every": save_every,
        "train.tensorboard": tensorboard,
    }
    config = _config(run_file, said, assignments or [], without_teachers=method == "sft")
    with _TrainingScreen(config.train.torch_device, as_json) as shown:
        if dry_run:
            planned = plan(config, on_progress=shown.follow)
        else:
            result = run(
                config,
                overwrite=overwrite,
                resume=resume,
                go_on=screen.this_command("--overwrite", "--resume") + " --resume",
                on_progress=shown.follow,
            )
    if int(os.environ.get("RANK", "0")):
        return  # of several processes the first one tells
    if dry_run:
        _print_plan(config, planned, as_json)
    else:
        _print_result(result, as_json)


def _config(
    run_file: str | None, said: Mapping[str, Any], assignments: list[str], *, without_teachers: bool
) -> DistillConfig:
    """Lay options over a run file, and assignments over both."""
    from cdm_toolkit.artifacts.settings import read_yaml, with_settings
    from cdm_toolkit.distill.recipes import find_run_file
    from cdm_toolkit.distill.settings import from_mapping
    from cdm_toolkit.errors import BadSettings

    content: dict[str, Any] = {}
    if run_file is not None:
        content = read_yaml(find_run_file(run_file))
    if isinstance(content.get("data"), str):
        content["data"] = {"path": content["data"]}
    given = {name: value for name, value in said.items() if value is not None}
    of_teacher = [name for name in given if name.startswith("teachers.")]
    if without_teachers:
        content["teachers"] = []
        given = {name: value for name, value in given.items() if name not in of_teacher}
    elif not content.get("teachers") and (run_file is None or of_teacher):
        content["teachers"] = [{}]
    content = with_settings(
        content, [f"{name}={_as_yaml(value)}" for name, value in given.items()], source="the options"
    )
    content = with_settings(content, assignments, source="--set")
    if run_file is not None:
        return from_mapping(content, source=run_file)
    try:
        return from_mapping(content, source="the command line")
    except BadSettings as error:
        faults = [_in_options(fault, said) for fault in error.faults]
        raise BadSettings("the command line", faults) from None


class DistillCommand(TyperCommand):
    """A command whose help lists the methods, which are looked up when it is shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from cdm_toolkit.cli.method_names import method_summaries

        for parameter in self.params:
            if parameter.name == "method":
                listed = [f"{name}: {summary}" for name, summary in method_summaries().items()]
                parameter.help = "What is learned from the teacher. " + "; ".join([*listed, "sft: nothing"])  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


_NAMED_OTHERWISE = {
    "data.path": "--data",
    "teachers.0.model": "--teacher",
    "teachers.0.cache": "--teacher-cache",
    "train.lora.rank": "--lora-rank",
}


def _in_options(fault: str, settings: Iterable[str]) -> str:
    """Name the option that sets what a fault is about, to somebody who has no run file."""
    setting, _, rest = fault.partition(" ")
    if setting in settings:
        return f"{_NAMED_OTHERWISE.get(setting) or _option_of(setting)} {rest}"
    return fault.removeprefix("teachers.0: ")


def _option_of(setting: str) -> str:
    return "--" + setting.rpartition(".")[2].replace("_", "-")


def _as_yaml(value: Any) -> str:
    """Write a value so that it is read back as what it is, whatever it looks like."""
    import json

    return json.dumps(str(value) if isinstance(value, Path) else value)


class _TrainingScreen:
    """Draw the stages of a run, and a line of the log now and then."""

    def __init__(self, device: str, quiet: bool) -> None:
        from cdm_toolkit.cli import screen

        self._bar = screen.progress()
        self._device = device
        self._console = self._bar.console
        self._tasks: dict[str, Any] = {}
        self._last: StepLog | None = None
        self._logged_at = time.monotonic()
        self._first_process = not int(os.environ.get("RANK", "0"))
        self._quiet = quiet or not self._first_process

    def __enter__(self) -> _TrainingScreen:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)  # type: ignore[arg-type]

    def follow(self, progress: Progress) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bar.add_task(
                STAGES[progress.stage], total=progress.total, note=""
            )
            if progress.stage == "train":
                self._logged_at = time.monotonic()
            if progress.stage == "load" and self._first_process:
                self._say_device()  # not before: a mistake of the user's is then one line
        task = self._tasks[progress.stage]
        self._bar.update(task, completed=progress.done, total=progress.total)
        if progress.log is not None and progress.log is not self._last:
            self._last = progress.log
            now = time.monotonic()
            speed = progress.log.tokens / max(now - self._logged_at, 1e-9)
            self._logged_at = now
            self._bar.update(task, note=f"{speed:,.0f} tokens/s")
            if not self._quiet:
                line = _log_line(progress.log, speed)
                self._console.print(line, markup=False, soft_wrap=True, style="dim")

    def _say_device(self) -> None:
        from cdm_toolkit.cli import screen

        screen.say_device(self._device)


STAGES = {
    "align": "aligning rows",
    "load": "loading models",
    "entropies": "entropies of the models",
    "neighbours": "near tokens",
    "look": "looking at rows",
    "train": "training",
    "save": "saving",
}


def _log_line(log: StepLog, speed: float) -> str:
    parts = [f"step {log.step:>5}", f"loss {log.loss:.4f}", f"CE {log.ce:.4f}"]
    for teacher in log.teachers:
        parts.append(f"{'KD' if len(log.teachers) == 1 else teacher.name} {teacher.kd:.4f}")
        if teacher.pairs:
            parts.append(f"matched mass {teacher.matched_mass:.1%}")
    return "   ".join([*parts, f"lr {log.learning_rate:.1e}", f"{speed:,.0f} tokens/s"])


def _print_result(result: RunResult, as_json: bool) -> None:
    from cdm_toolkit.cli import screen

    if as_json:
        screen.print_json(asdict(result) | {"output": str(result.output)})
        return
    for warning in result.warnings:
        screen.warn(warning)
    shown = screen.table(None, "what", "figure")
    first, last = result.losses[0], result.losses[-1]
    shown.add_row("student", str(result.output))
    shown.add_row("rows", str(result.rows))
    shown.add_row("steps", f"{result.steps:,}")
    shown.add_row("CE, nats a token", f"{first.ce:.4f} → {last.ce:.4f}")
    for before, after in zip(first.teachers, last.teachers, strict=True):
        of = "" if len(last.teachers) == 1 else f" on {after.name}"
        shown.add_row(f"KD{of}, a group", f"{before.kd:.4f} → {after.kd:.4f}")
        if after.pairs:
            shown.add_row(f"matched mass{of}", f"{after.matched_mass:.1%}")
        shown.add_row(f"aligned share{of}", f"{after.aligned_share:.1%} of the student's labels")
    shown.add_row("time", f"{result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s in training")
    screen.out().print(shown, markup=False)


def _print_plan(config: DistillConfig, planned: Plan, as_json: bool) -> None:
    from cdm_toolkit.cli import screen

    if as_json:
        settings = {"config": config.model_dump(mode="json")}
        screen.print_json(asdict(planned) | settings)
        return
    shown = screen.table(None, "what", "figure")
    shown.add_row("student", f"{config.student}, {planned.parameters / 1e6:,.1f} M parameters")
    if planned.trained_parameters != planned.parameters:
        shown.add_row("trained", f"{planned.trained_parameters / 1e6:,.2f} M parameters")
    shown.add_row("rows", str(planned.rows))
    shown.add_row(
        "steps", f"{planned.steps:,} of {planned.rows_per_step} rows ({planned.steps_an_epoch:,} an epoch)"
    )
    shown.add_row(
        "tokens", f"{planned.tokens_an_epoch:,} an epoch, {planned.labels_an_epoch:,} of them trained on"
    )
    shown.add_row("CE, nats a token", f"{planned.ce:.4f} on {planned.looked_at} rows")
    for teacher in planned.teachers:
        parts = [f"{teacher.method}, weight {teacher.weight:g}", f"KD {teacher.kd:.4f}"]
        if teacher.pairs:
            parts.append(f"matched mass {teacher.matched_mass:.1%}, {teacher.pairs:.0f} pairs a group")
        parts.append(f"{teacher.aligned_share:.1%} of the labels aligned")
        shown.add_row(f"teacher {teacher.name}", "; ".join(parts))
    for name, size in planned.memory.items():
        shown.add_row(name, f"{size / 2**20:,.0f} MiB")
    shown.add_row("in all, estimated", f"{sum(planned.memory.values()) / 2**30:,.1f} GiB")
    shown.add_row("output", config.output)
    screen.out().print(shown, markup=False)
    for warning in planned.warnings:
        screen.warn(warning)
