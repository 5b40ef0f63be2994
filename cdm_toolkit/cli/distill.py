"""`cdm distill`: train a student on its teachers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from cdm_toolkit.cli import completion, options
from cdm_toolkit.cli.settings_options import run_option
from cdm_toolkit.distill.logs import first_to_last

if TYPE_CHECKING:
    from cdm_toolkit.distill.logs import EvalLog, SampleLog, StepLog, TeacherLog
    from cdm_toolkit.distill.plan import Plan
    from cdm_toolkit.distill.prepare import Progress
    from cdm_toolkit.distill.run import RunResult
    from cdm_toolkit.distill.settings import DistillConfig

_RUN, _KD, _TRAIN = "The run", "Distillation (of the first teacher)", "Training"
SETTINGS: Mapping[str, str] = {
    "student": "student",
    "teacher": "teachers.0.model",
    "teacher_cache": "teachers.0.cache",
    "data": "data.path",
    "held_out": "eval.path",
    "output": "output",
    "preset": "preset",
    "method": "teachers.0.method",
    "alpha": "alpha",
    "lr": "train.lr",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "batch_size": "train.batch_size",
    "max_length": "data.max_length",
    "template": "data.template",
    "seed": "train.seed",
    "device": "train.device",
}
"""The settings of a run that have an option of their own."""


def distill(
    context: typer.Context,
    run_file: Annotated[
        str | None,
        typer.Argument(
            help="A run file (YAML), or the name of a recipe (cdm recipes list). Options go over it.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    student: Annotated[str | None, run_option("student", _RUN, names=completion.models)] = None,
    teacher: Annotated[
        str | None, run_option("teachers.0.model", _RUN, "--teacher", names=completion.models)
    ] = None,
    teacher_cache: Annotated[Path | None, run_option("teachers.0.cache", _RUN, "--teacher-cache")] = None,
    data: Annotated[Path | None, run_option("data.path", _RUN, "--data")] = None,
    held_out: Annotated[Path | None, run_option("eval.path", _RUN, "--eval")] = None,
    output: Annotated[Path | None, run_option("output", _RUN, "--output", "-o")] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper: the settings of arXiv 2502.11104.", rich_help_panel=_RUN)
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any setting of a run file, such as train.save_every=100 or teachers.0.top_k=400. Again for more.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    method: Annotated[
        str | None, run_option("teachers.0.method", _KD, names=completion.methods_or_none)
    ] = None,
    alpha: Annotated[float | None, run_option("alpha", _KD)] = None,
    lr: Annotated[float | None, run_option("train.lr", _TRAIN)] = None,
    epochs: Annotated[float | None, run_option("train.epochs", _TRAIN)] = None,
    max_steps: Annotated[int | None, run_option("train.max_steps", _TRAIN)] = None,
    batch_size: Annotated[int | None, run_option("train.batch_size", _TRAIN)] = None,
    max_length: Annotated[int | None, run_option("data.max_length", _TRAIN)] = None,
    template: Annotated[str | None, run_option("data.template", _TRAIN)] = None,
    seed: Annotated[int | None, run_option("train.seed", _TRAIN)] = None,
    device: Annotated[str | None, run_option("train.device", _TRAIN)] = None,
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
    said = {setting: context.params[name] for name, setting in SETTINGS.items()}
    without_teachers = method == "sft"
    if without_teachers:
        said["teachers.0.method"] = None
    config = _config(run_file, said, assignments or [], without_teachers=without_teachers)
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
    for name in ("data", "eval"):
        if isinstance(content.get(name), str):
            content[name] = {"path": content[name]}
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
        faults = [_in_options(fault) for fault in error.faults]
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


def _in_options(fault: str) -> str:
    """Name the option that sets what a fault is about, to somebody who has no run file."""
    setting, _, rest = fault.partition(" ")
    options = {setting: name for name, setting in SETTINGS.items()}
    options |= {"data": "data", "eval.path": "eval"}
    if setting in options:
        return f"--{options[setting].replace('_', '-')} {rest}"
    return fault.removeprefix("teachers.0: ")


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
            if progress.stage == "load" and self._first_process:
                self._say_device()  # not before: a mistake of the user's is then one line
        task = self._tasks[progress.stage]
        self._bar.update(task, completed=progress.done, total=progress.total)
        if progress.log is not None and progress.log is not self._last:
            self._last = progress.log
            self._bar.update(task, note=_speed(progress.log))
            if not self._quiet:
                self._say(progress.log, progress.samples)

        if progress.evaluation is not None and not self._quiet:
            line = _evaluation_line(progress.evaluation)
            self._console.print(line, markup=False, soft_wrap=True, style="bold")

    def _say(self, log: StepLog, samples: Sequence[Mapping[str, Any]]) -> None:
        lines = [_log_line(log)]
        lines += [] if log.samples is None else ["  " + _samples_line(log.samples)]
        lines += [_sample_line(sample, self._console.width) for sample in samples[:1]]
        for line in lines:
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
    "evaluate": "evaluating",
    "save": "saving",
}


def _speed(log: StepLog) -> str:
    return "" if log.tokens_per_second is None else f"{log.tokens_per_second:,.0f} tokens/s"


def _log_line(log: StepLog) -> str:
    parts = [f"step {log.step:>5}", f"loss {log.loss:.4f}"]
    parts += [] if log.ce is None else [f"CE {log.ce:.4f}"]
    parts += _of_teachers(log.teachers)
    parts += [f"lr {log.learning_rate:.1e}", _speed(log)]
    if log.padding is not None and log.seconds is not None:
        parts.append(f"padding {log.padding:.0%}")
        taken = asdict(log.seconds)
        each = ", ".join(f"{part} {seconds:.2g}" for part, seconds in taken.items() if seconds >= 5e-4)
        parts.append(f"{sum(taken.values()):.2g} s a step: {each}")
    return "   ".join(parts)


def _samples_line(log: SampleLog) -> str:
    teachers = ", ".join(f"{value:.3f}" for value in log.teacher_logprobs)
    parts = [f"samples {log.share:.0%} of the rows", f"{log.tokens:.0f} tokens", f"{log.ended:.0%} ended"]
    parts.append(f"log-probability a byte {log.student_logprob:.3f}, the teacher's {teachers}")
    if log.tokens_per_second is not None:
        parts.append(f"sampled {log.tokens_per_second:,.0f} tokens/s")
    return "   ".join(parts)


def _sample_line(sample: Mapping[str, Any], width: int) -> str:
    """Show one sample in a line."""
    how = "" if sample["ended"] else ", cut"
    head = f"row {sample['row']}, {sample['tokens']} token{'s' * (sample['tokens'] != 1)}{how}: "
    printable = (letter if letter.isprintable() else " " for letter in str(sample["completion"]))
    text = " ".join("".join(printable).split())
    room = max(width - len(head) - 4, 20)
    return f"    {head}{text if len(text) <= room else text[: room - 1] + '…'}"


def _evaluation_line(log: EvalLog) -> str:
    parts = [f"step {log.step:>5}", "held-out rows:"]
    if log.loss is not None:
        parts.append(f"loss {log.loss:.4f}")
    parts += [f"CE {log.ce:.4f}", *_of_teachers(log.teachers), f"bits per byte {log.bits_per_byte:.4f}"]
    return "   ".join([*parts, f"{log.seconds:.2g} s", *(["the best so far"] if log.is_best else [])])


def _of_teachers(teachers: Sequence[TeacherLog]) -> Iterator[str]:
    for teacher in teachers:
        yield f"{'KD' if len(teachers) == 1 else teacher.name} {teacher.kd:.4f}"
        if teacher.pairs:
            yield f"matched mass {teacher.matched_mass:.1%}"


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
    shown.add_row("CE, nats a token", first_to_last(first.ce, last.ce))
    for before, after in zip(first.teachers, last.teachers, strict=True):
        of = "" if len(last.teachers) == 1 else f" on {after.name}"
        shown.add_row(f"KD{of}, a group", f"{before.kd:.4f} → {after.kd:.4f}")
        if after.pairs:
            shown.add_row(f"matched mass{of}", f"{after.matched_mass:.1%}")
        shown.add_row(f"aligned share{of}", f"{after.aligned_share:.1%} of the student's labels")
    if last.samples is not None:
        ended = f"{last.samples.tokens:.0f} tokens, {last.samples.ended:.0%} ended by themselves"
        shown.add_row("samples, in the end", ended)
    if result.best is not None:
        begun, best = result.evaluations[0], result.best
        stopped = f"; stopped early at {result.steps:,}" if result.stopped_early else ""
        shown.add_row("weights", f"of step {best.step:,}, the best on held-out rows{stopped}")
        shown.add_row("held-out CE, nats a token", f"{begun.ce:.4f} → {best.ce:.4f}")
        shown.add_row("held-out bits per byte", f"{begun.bits_per_byte:.4f} → {best.bits_per_byte:.4f}")
    if result.uploaded:
        shown.add_row("uploaded", result.uploaded)
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
    if (sampling := planned.sampling) is not None:
        after = "" if sampling.buffer_steps == 1 else f", drawn for {sampling.buffer_steps} steps at once"
        shown.add_row(
            "samples",
            f"{sampling.per_step:,.3g} a step of at most {sampling.tokens:,} tokens{after}, "
            f"after {sampling.prompts:,} prompts",
        )
    if planned.evaluations:
        shown.add_row("evaluations", f"{planned.evaluations:,}, of {planned.held_out:,} held-out rows")
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
