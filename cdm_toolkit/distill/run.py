"""One distillation run, from settings to a student on disk."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cdm_toolkit.artifacts.atomic import atomic_folder
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.distill.dataset import RowCounts
from cdm_toolkit.distill.logs import EvalLog, StepLog
from cdm_toolkit.distill.model_card import model_card
from cdm_toolkit.distill.output_folder import claim_output, last_checkpoint, remove_run
from cdm_toolkit.distill.prepare import OnProgress, Prepared, Progress, prepare
from cdm_toolkit.distill.settings import DistillConfig
from cdm_toolkit.distill.sharding import check_launch, is_sharded
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.distill.trainer import DistillTrainer
from cdm_toolkit.distill.training_arguments import training_arguments
from cdm_toolkit.errors import BadOption, FileProblem, Interrupted, ServerProblem
from cdm_toolkit.hub.models import model_folder_to_fill, save_model
from cdm_toolkit.hub.upload import check_login, upload
from cdm_toolkit.teachers.served import Stopped

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run has done. `losses` and `tokens` (the student's, prompts included, padding not) are of the whole
    run, also where it went on from a checkpoint."""

    output: Path
    steps: int
    losses: tuple[StepLog, ...]
    rows: RowCounts
    tokens: int
    tokens_per_second: float
    """In training, since this process began."""
    seconds: float
    warnings: tuple[str, ...]
    evaluations: tuple[EvalLog, ...] = ()
    """Of the held-out rows, where there are any."""
    best: EvalLog | None = None
    """The evaluation of the weights that were written; None without held-out rows: they are then the last ones."""
    stopped_early: bool = False
    uploaded: str | None = None
    """Address on the hub, where `train.trainer` has push_to_hub."""


def run(
    config: DistillConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    go_on: str = "the same run with resume",
    on_progress: OnProgress = lambda _: None,
) -> RunResult:
    """Train a student as `config` says, and write it to `config.output` with its tokenizer, card and provenance.

    Settings, output folder and data are checked before a model is loaded. `overwrite` replaces what an earlier
    run left in the output folder, `resume` goes on from its last checkpoint. SIGINT and SIGTERM end the run
    after the step at hand, with a checkpoint; `go_on` is what the error then names. Raises Interrupted, and the
    errors of settings, data and models, NothingToTrain, NotFinite.
    """
    began = time.perf_counter()
    check_launch(config.train.torch_device)  # a device that is not here is told before anything is read
    output = Path(config.output)
    arguments = training_arguments(config, output)
    if config.train.hub_repository:
        check_login()
    rows = Rows(config.sources, config.train.seed)
    len(rows)  # rows that are not as they must be are told before the output is touched
    made = not output.exists()
    with _main_process_first(config):
        checkpoint = claim_output(output, overwrite=overwrite, resume=resume)
    try:
        prepared = _prepared(config, rows, checkpoint, on_progress)
        with prepared.opened:
            return _run(prepared, arguments, checkpoint, overwrite, go_on, on_progress, began)
    except (OSError, SafetensorError) as error:  # of a checkpoint: models and data raise their own
        why = getattr(error, "strerror", None) or str(error)
        raise FileProblem(
            output, f"it cannot be written ({why})", "make room, then go on with `resume`"
        ) from error
    except Exception as error:
        tracker = type(error).__module__.partition(".")[0]
        if tracker not in config.train.report_to:
            raise
        allowed = f"it when it is set up: {' '.join(str(error).split())[:200]}"
        raise BadOption("train.report_to", tracker, allowed) from error
    finally:
        if made and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _prepared(
    config: DistillConfig, rows: Rows, checkpoint: Path | None, on_progress: OnProgress
) -> Prepared:
    from transformers import set_seed

    set_seed(config.train.seed)
    with _main_process_first(config):  # what the first finds in no cache, the others find there
        return prepare(config, rows, on_progress, resumed=checkpoint is not None)


def _run(
    prepared: Prepared,
    arguments: TrainingArguments,
    checkpoint: Path | None,
    overwrite: bool,
    go_on: str,
    on_progress: OnProgress,
    began: float,
) -> RunResult:
    config, output = prepared.config, Path(prepared.config.output)
    if overwrite and arguments.should_save:
        remove_run(output)
    with _told_to_stop() as stopping:
        trainer = prepared.trainer(
            arguments,
            on_step=lambda done, total, log: on_progress(
                Progress("train", done, total, log, samples=trainer.samples)
            ),
            on_evaluation=lambda done, total, found: on_progress(
                Progress("evaluate", done, total, evaluation=found)
            ),
            stopping=stopping,
        )
        if checkpoint:
            trainer.read_logs(checkpoint)
        before = len(trainer.history)
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (Stopped, ServerProblem) as problem:  # in an evaluation
            trainer.stopped_by = problem
        ended = time.perf_counter()
    steps, planned = trainer.state.global_step, trainer.state.max_steps
    if isinstance(trainer.stopped_by, ServerProblem):
        raise _with_checkpoint(trainer.stopped_by, output)
    if trainer.stopped_by is not None or (steps < planned and not trainer.stopped_early):
        raise _interrupted(output, planned, go_on)
    trainer.load_best()
    result = RunResult(
        output=output,
        steps=steps,
        losses=tuple(trainer.history),
        rows=prepared.counts,
        tokens=sum(log.tokens for log in trainer.history),
        tokens_per_second=sum(log.tokens for log in trainer.history[before:]) / (ended - started),
        seconds=ended - began,
        warnings=prepared.warnings,
        evaluations=tuple(trainer.evaluations),
        best=trainer.best,
        stopped_early=trainer.stopped_early,
    )
    on_progress(Progress("save", 0, 1))
    _write(trainer, prepared, result)
    prepared.flush_answers()
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save and (trainer.state.epoch or 0) >= 1:
        prepared.finish_answers()
    repository = config.train.hub_repository
    if repository and trainer.args.should_save:
        private = (config.train.trainer or {}).get("hub_private_repo")
        result = replace(result, uploaded=upload(output, repository, private=private))
    on_progress(Progress("save", 1, 1))
    return result


def _with_checkpoint(problem: ServerProblem, output: Path) -> ServerProblem:
    """Say in the error of a server from where the run can go on."""
    checkpoint = last_checkpoint(output)
    if checkpoint is None:
        return ServerProblem(problem.url, problem.problem, f"{problem.fix}, and start again with `overwrite`")
    fix = f"{problem.fix}, then go on with `resume`: {checkpoint} has what is done"
    return ServerProblem(problem.url, problem.problem, fix)


def _interrupted(output: Path, planned: int, go_on: str) -> Interrupted:
    checkpoint = last_checkpoint(output)
    if checkpoint is None:
        return Interrupted("the run", "it was in its first step", "the same run, with `overwrite`")
    step = checkpoint.name.removeprefix("checkpoint-")
    return Interrupted("the run", f"step {step} of {planned} is kept in {checkpoint}", go_on)


def _main_process_first(config: DistillConfig) -> AbstractContextManager[None]:
    """Let the first of several processes go ahead, where `accelerate launch` has started several."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=config.train.torch_device == "cpu").main_process_first()  # type: ignore[no-any-return]


@contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """Say whether SIGINT or SIGTERM has come; a second one stops at once. In the main thread only."""
    told = threading.Event()

    def tell(number: int, _frame: Any) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    if threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return
    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(trainer: DistillTrainer, prepared: Prepared, result: RunResult) -> None:
    """Write the student, its tokenizer, its card and the provenance; adapters are merged, and kept beside."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, also where it is in shards
    if not trainer.args.should_save:
        return
    student: Any = trainer.accelerator.unwrap_model(trainer.model)
    facts = _provenance(prepared, result)
    if prepared.config.train.lora is not None:
        if is_sharded():  # what is in shards cannot be merged
            student = prepared.student_again(weights)
        with atomic_folder(result.output / "adapter", overwrite=True) as folder:
            student.save_pretrained(folder)
    with model_folder_to_fill(result.output) as folder:
        if prepared.config.train.lora is not None:
            student, weights = student.merge_and_unload(), None
        student.config.use_cache = True  # the Trainer turns it off
        save_model(student, prepared.student_tokenizer, folder, weights=weights)
        (folder / "provenance.json").write_text(
            json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8"
        )
        card = model_card(prepared.config, result.losses, result.evaluations, facts)
        (folder / "README.md").write_text(card, "utf-8")


def _provenance(prepared: Prepared, result: RunResult) -> dict[str, Any]:
    """Say what made the student, and of what."""
    config = prepared.config
    fingerprints = {"student tokenizer": prepared.student_tokenizer.view.fingerprint}
    for nth, tokenizer in enumerate(prepared.teacher_tokenizers):
        fingerprints[f"tokenizer of teacher {nth}"] = tokenizer.view.fingerprint
    made_by = provenance(fingerprints=fingerprints, seed=config.train.seed, device=config.train.torch_device)
    figures = {"steps": result.steps, "tokens": result.tokens, "seconds": round(result.seconds, 1)}
    return {
        **made_by,
        "config": config.model_dump(mode="json", exclude_unset=True),
        "rows": asdict(result.rows),
        "losses": [asdict(log) for log in result.losses],
        "evaluations": [asdict(log) for log in result.evaluations],
        "step_of_weights": result.best.step if result.best else result.steps,
        "warnings": list(result.warnings),
        **figures,
    }
