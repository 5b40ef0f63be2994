"""Whole runs, on tiny fresh models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from cdm_toolkit.distill import run as run_module
from cdm_toolkit.distill import trainer as trainer_module
from cdm_toolkit.distill.logs import StepLog, read_history
from cdm_toolkit.distill.output_folder import last_checkpoint
from cdm_toolkit.distill.plan import plan
from cdm_toolkit.distill.prepare import Progress, prepare
from cdm_toolkit.distill.run import RunResult, run
from cdm_toolkit.distill.settings import SourceConfig, from_mapping
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.distill.trainer import Mixture
from cdm_toolkit.distill.training_arguments import training_arguments
from cdm_toolkit.errors import (
    BadArtifact,
    BadOption,
    FileProblem,
    Interrupted,
    NotFinite,
    NothingToTrain,
    OutputExists,
    UnknownName,
)
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.teachers import Local


def losses(result: RunResult) -> list[tuple[float, ...]]:
    return losses_of(result.losses)


def losses_of(lines: Sequence[StepLog]) -> list[tuple[float, ...]]:
    return [
        (log.step, log.loss, log.ce, *(teacher.kd for teacher in log.teachers), log.grad_norm)
        for log in lines
    ]


def test_writes_a_student_that_loads_with_equal_logits(config, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Any] = []
    save = run_module.save_model

    def kept(model: Any, *rest: Any, **more: Any) -> None:
        trained.append(model)
        save(model, *rest, **more)

    monkeypatch.setattr(run_module, "save_model", kept)
    events: list[Progress] = []
    result = run(config(), on_progress=events.append)

    assert result.steps == 4
    assert [log.step for log in result.losses] == [1, 2, 3, 4]
    assert result.losses[-1].ce < result.losses[0].ce
    last, (teacher,) = result.losses[-1], result.losses[-1].teachers
    assert last.loss == pytest.approx(0.8 * last.ce + 0.2 * teacher.kd, rel=1e-5)
    assert teacher.kd > 0
    assert 0.1 < teacher.matched_mass <= 1
    assert 0.1 < teacher.aligned_share <= 1
    assert {event.stage for event in events} >= {"align", "load", "train", "save"}
    assert [(e.done, e.total) for e in events if e.stage == "train"] == [(i, 4) for i in (1, 2, 3, 4)]

    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        expected = trained[0].eval()(ids).logits
        loaded = load_model(str(result.output))
        assert torch.equal(loaded(ids).logits, expected)
    assert loaded.config.use_cache
    fingerprint = load_tokenizer(str(result.output)).view.fingerprint
    facts = json.loads((result.output / "provenance.json").read_text(encoding="utf-8"))
    assert facts["fingerprints"]["student tokenizer"] == fingerprint
    assert (facts["steps"], facts["rows"]["trained"], len(facts["losses"])) == (4, 24, 4)
    assert from_mapping(facts["config"]) == config(), "the provenance holds the run file"
    assert not list(result.output.glob(".*")), "nothing half-written stays"


def test_a_line_has_the_padding_and_the_seconds_of_its_parts(config) -> None:
    prepared = prepare(config(), Rows(config().data.all_sources), lambda _: None)
    lengths = prepared.features.student_lengths
    (whole,) = run(config(batch_size=24, max_steps=1)).losses
    assert whole.tokens == lengths.sum()
    assert whole.padding == pytest.approx(1 - lengths.sum() / (24 * lengths.max()))
    result = run(config(max_steps=5, grad_accumulation=2, log_every=2), overwrite=True)
    before = 0
    for log in result.losses:
        taken = asdict(log.seconds)
        assert taken.pop("sampling") == 0
        assert all(seconds > 0 for seconds in taken.values())
        in_all, before = (log.step - before) * sum(taken.values()), log.step
        assert log.tokens_per_second == pytest.approx(log.tokens / in_all)
    alone = run(config({"teachers": []}, max_steps=1), overwrite=True)
    assert alone.losses[0].seconds.teacher < alone.losses[0].seconds.student / 2, "nobody is asked"


def test_lines_of_an_earlier_version_are_read(config, tmp_path: Path) -> None:
    result = run(config(max_steps=2))
    assert read_history(tmp_path / "out" / "checkpoint-2") == list(result.losses)
    lines = json.loads((tmp_path / "out" / "checkpoint-2" / "history.json").read_text())
    for line in lines:
        del line["tokens_per_second"], line["padding"], line["seconds"]
    (tmp_path / "history.json").write_text(json.dumps(lines))
    assert losses_of(read_history(tmp_path)) == losses(result)


def test_the_card_has_figures_and_the_run_file(config) -> None:
    result = run(config())
    card = (result.output / "README.md").read_text(encoding="utf-8")
    head, body = card.split("---\n")[1:3]
    assert yaml.safe_load(head)["base_model"] == config().student
    assert "| optimizer steps | 4 |" in body
    again = body.split("```yaml\n")[1].split("```")[0]
    assert from_mapping(yaml.safe_load(again)) == config()


def test_same_seed_same_losses_and_weights(config, tmp_path: Path) -> None:
    first, second = (run(config({"output": str(tmp_path / name)})) for name in "ab")
    assert losses(first) == losses(second)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    other = run(config({"output": str(tmp_path / "c")}, seed=1))
    assert losses(other) != losses(first)


def test_accumulation_and_batches_agree(config, tmp_path: Path) -> None:
    """A step over 4 rows is the same as one batch, as two of 2, and as four of 1."""
    runs = [
        run(
            config(
                {"output": str(tmp_path / str(size))},
                batch_size=size,
                grad_accumulation=4 // size,
                max_steps=3,
            )
        )
        for size in (4, 2, 1)
    ]
    for other in runs[1:]:
        for one, two in zip(losses(runs[0]), losses(other), strict=True):
            assert two[:-1] == pytest.approx(one[:-1], abs=1e-5)
            assert two[-1] == pytest.approx(one[-1], abs=1e-4)


def test_packed_rows_train_as_padded_ones(config, tmp_path: Path) -> None:
    padded, packed = (
        run(config({"output": str(tmp_path / str(pack))}, pack=pack, group_by_length=False))
        for pack in (False, True)
    )
    for one, two in zip(losses(padded), losses(packed), strict=True):
        assert two[:-1] == pytest.approx(one[:-1], abs=1e-5)
        assert two[-1] == pytest.approx(one[-1], abs=1e-4)
    assert [log.tokens for log in packed.losses] == [log.tokens for log in padded.losses]
    assert sum(log.padding for log in packed.losses) < sum(log.padding for log in padded.losses)


def test_a_model_that_does_not_keep_rows_apart_is_not_packed(config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdm_toolkit.distill.prepare.keeps_rows_apart", lambda _: False)
    with pytest.raises(
        BadOption, match=r"`train.pack` is True.*does not keep rows apart.*\(attention sdpa\)"
    ):
        run(config(pack=True))


@pytest.mark.parametrize("pack", [False, True])
def test_batches_of_tokens_have_each_row_once_an_epoch(
    config, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: bool
) -> None:
    seen: list[tuple[tuple[int, ...], int]] = []
    real = trainer_module.DistillTrainer._student_sums

    def watched(self: Any, model: Any, batch: Any, inputs: Any) -> Any:
        seen.append((batch.rows, batch.student["input_ids"].numel()))
        return real(self, model, batch, inputs)

    monkeypatch.setattr(trainer_module.DistillTrainer, "_student_sums", watched)
    chosen = config(max_steps=None, epochs=2, batch_tokens=120, pack=pack)
    result = run(chosen)
    an_epoch = result.steps // 2
    for epoch in (seen[:an_epoch], seen[an_epoch:]):
        assert sorted(row for rows, _ in epoch for row in rows) == list(range(1, 25))
    assert seen[:an_epoch] != seen[an_epoch:]
    assert max(len(rows) for rows, _ in seen) > min(len(rows) for rows, _ in seen)
    assert all(positions <= 120 * 1.2 for _, positions in seen)
    planned = plan(chosen)
    assert (planned.steps, planned.steps_an_epoch) == (result.steps, an_epoch)


@pytest.mark.parametrize(
    ("loading", "shown", "within"),
    [
        ({"dtype": "auto"}, "", 0),
        ({"device": "cpu"}, " on cpu", 0),
        ({"device_map": "auto"}, " on several devices", 0),
        ({"quantization": "8bit"}, "", 0.01),
    ],
    ids=str,
)
def test_a_teacher_that_is_loaded_otherwise(
    config, tiny, loading: dict[str, str], shown: str, within: float
) -> None:
    """Plan and losses are those of the teacher in float32 on the student's device, within what its bits allow."""
    if "quantization" in loading:
        pytest.importorskip("bitsandbytes")
    chosen = config({"teachers": [{"model": tiny.teacher, "top_k": 40} | loading]})
    planned, plain = plan(chosen), plan(config())
    assert planned.teachers[0].kd == pytest.approx(plain.teachers[0].kd, rel=within)
    weights = {name: size for name, size in planned.memory.items() if name.endswith("weights")}
    teacher = f"teacher {tiny.teacher}"
    assert list(weights) == ["student weights", f"{teacher}{shown}, weights"]
    fewer = weights.popitem()[1] < plain.memory[f"{teacher}, weights"]
    assert fewer == ("quantization" in loading)
    found, expected = ([log.loss for log in run(made, overwrite=True).losses] for made in (chosen, config()))
    assert found == pytest.approx(expected, rel=within)


def test_a_teacher_that_cannot_be_where_it_is_asked_to_be_is_told_first(config, tiny) -> None:
    for loading, message in (
        ({"device": "cuda:9"}, "`teachers.0.device` is 'cuda:9'; give"),
        ({"device_map": "even"}, "`teachers.0.device_map` is 'even'; give one of auto"),
    ):
        seen: list[str] = []
        with pytest.raises(BadOption) as caught:
            run(
                config({"teachers": [{"model": tiny.teacher} | loading]}),
                on_progress=lambda progress, seen=seen: seen.append(progress.stage),
            )
        assert message in str(caught.value)
        assert not seen


def test_batches_of_tokens_go_on_where_they_were(config, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": None,
        "epochs": 2,
        "batch_tokens": 120,
        "pack": True,
        "save_every": 2,
    }
    whole = run(config({"output": str(tmp_path / "whole")}, **settings))

    def after_three(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(config({"output": str(tmp_path / "part")}, **settings), on_progress=after_three)
    rest = run(config({"output": str(tmp_path / "part")}, **settings), resume=True)
    assert losses(rest) == losses(whole)


def test_each_source_has_an_alpha_of_its_own(config, tiny, tmp_path: Path) -> None:
    """The loss of a step over rows of both is linear in the alphas, and with one alpha is that without sources."""
    lines = Path(tiny.data).read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:5]))
    (tmp_path / "b.jsonl").write_text("".join(lines[5:]))

    def loss(*alphas: float | None) -> float:
        sources = [
            {"path": str(tmp_path / f"{name}.jsonl"), "alpha": alpha}
            for name, alpha in zip("ab", alphas, strict=True)
        ]
        made = config({"output": str(tmp_path / "out"), "alpha": 0.3}, batch_size=24, max_steps=1)
        data = made.data.model_copy(update={"sources": tuple(map(SourceConfig.model_validate, sources))})
        return run(made.model_copy(update={"data": data}), overwrite=True).losses[0].loss

    none, first, second = loss(0, 0), loss(1, 0), loss(0, 1)
    both = none + 0.2 * (first - none) + 0.9 * (second - none)
    assert loss(0.2, 0.9) == pytest.approx(both, rel=1e-5)
    assert abs(first - none) > 1e-3 < abs(second - none)
    plain = run(config({"alpha": 0.3}, batch_size=24, max_steps=1), overwrite=True).losses[0].loss
    assert loss(0.3, 0.3) == loss(None, None) == plain
    assert loss(None, 0.9) == pytest.approx(none + 0.3 * (first - none) + 0.9 * (second - none), rel=1e-5)


def test_processes_run_equally_many_batches(config, tiny) -> None:
    """One that has no rows of an alpha runs a row that does not count."""
    rows = Rows(config().data.all_sources)
    prepared = prepare(config(), rows, lambda _: None)
    mixture = Mixture((0.2, 0.9), lambda numbers: [0.2] * len(numbers))
    few = prepared.features[:3]
    (alone,) = trainer_module._CollatorByAlpha(prepared.collator, mixture, every_alpha=False)(few)["parts"]
    assert (alone.alpha, alone.is_dummy, len(alone.batch.rows)) == (0.2, False, 3)
    first, second = trainer_module._CollatorByAlpha(prepared.collator, mixture, every_alpha=True)(few)[
        "parts"
    ]
    assert first.batch.rows == alone.batch.rows
    assert (second.alpha, second.is_dummy, len(second.batch.rows)) == (0.9, True, 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepared.trainer(training_arguments(config(), Path(folder)))
    of_both = trainer.compute_loss(trainer.model, {"parts": [first, second]})
    assert of_both.item() == trainer.compute_loss(trainer.model, {"parts": [first]}).item()


def test_weights_say_how_often_an_epoch_has_a_row(config, tiny, tmp_path: Path) -> None:
    lines = Path(tiny.data).read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:4]))
    (tmp_path / "b.jsonl").write_text("".join(lines[4:]))
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "weight": 2},
        {"path": str(tmp_path / "b.jsonl"), "weight": 0.4},
    ]
    made = from_mapping(
        {"student": tiny.student, "data": sources, "output": str(tmp_path / "out")}
        | {"train": {"batch_size": 4, "epochs": 2, "log_every": 1, "device": "cpu"}}
    )
    assert (planned := plan(made)).steps_an_epoch == 4, "8 of the first, 8 of the second"
    result = run(made)
    assert (result.steps, planned.steps) == (8, 8)
    assert planned.tokens_an_epoch == pytest.approx(result.tokens / 2, rel=0.1)


def test_an_epoch_without_rows_is_told(config, tiny) -> None:
    with pytest.raises(
        BadOption, match=r"weight .* is 0.01; give more: an epoch has no row|an epoch has no row"
    ):
        plan(config({"data": {"weight": 0.01}}))


def test_sft_needs_no_teacher(config) -> None:
    result = run(config({"teachers": []}))
    assert all(log.loss == pytest.approx(log.ce, rel=1e-6) for log in result.losses)
    assert all(log.teachers == () for log in result.losses)


@pytest.mark.parametrize("method", ["cdm", "exact", "min-ed", "prefix", "uld", "alm", "gold"])
def test_each_method_across_tokenizers_trains(config, tiny, method: str) -> None:
    teacher = {"model": tiny.teacher, "method": method} | ({} if method == "alm" else {"top_k": 40})
    result = run(config({"teachers": [teacher], "alpha": 0.0}, max_steps=12, group_by_length=False, lr=1e-2))
    kd = [log.teachers[0].kd for log in result.losses]
    assert sum(kd[-3:]) < sum(kd[:3]), "the loss goes down"
    assert all(log.grad_norm > 0 for log in result.losses)


@pytest.mark.parametrize("method", ["kl", "reverse-kl", "jsd"])
def test_each_method_of_one_tokenizer_trains(config, tiny, tmp_path: Path, method: str) -> None:
    teacher = {"model": tiny.student, "method": method, "top_k": 40}
    result = run(config({"teachers": [teacher], "alpha": 0.0}, max_steps=1))
    assert result.losses[0].teachers[0].kd == pytest.approx(0, abs=1e-5), "the student is its own teacher"
    other = run(config({"output": str(tmp_path / "sft"), "teachers": []}, max_steps=8))
    result = run(config({"teachers": [teacher | {"model": str(other.output)}]}, max_steps=8), overwrite=True)
    kd = [log.teachers[0].kd for log in result.losses]
    assert kd[-1] < kd[0]


def test_two_teachers_in_one_run(config, tiny, tmp_path: Path) -> None:
    both = [
        {"model": tiny.teacher, "method": "spelling", "top_k": 40, "weight": 0.25},
        {"model": tiny.student, "method": "kl", "top_k": 40, "weight": 0.75},
    ]
    result = run(config({"teachers": both, "alpha": 0.2}))
    alone = run(config({"output": str(tmp_path / "alone"), "teachers": both[:1]}))
    for log in result.losses:
        spelling, kl = log.teachers
        expected = 0.2 * log.ce + 0.8 * (0.25 * spelling.kd + 0.75 * kl.kd)
        assert log.loss == pytest.approx(expected, rel=1e-5)
    assert result.losses[0].teachers[0] == alone.losses[0].teachers[0]
    assert result.losses[0].teachers[1].kd == pytest.approx(0, abs=1e-5)
    assert result.losses[-1].teachers[1].kd > 1e-4


def test_resumed_run_has_the_losses_of_an_unbroken_one(config, tmp_path: Path) -> None:
    """Stopped at a checkpoint in the second epoch, and resumed; lines sum up three steps."""
    whole = run(config({"output": str(tmp_path / "whole")}, save_every=8, max_steps=13, log_every=3))
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    for path in part.iterdir():
        if path.name != "checkpoint-8":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (part / "checkpoint-9").mkdir()  # one that was cut off before it was whole
    resumed = run(config({"output": str(part)}, save_every=8, max_steps=13, log_every=3), resume=True)
    assert losses(resumed) == losses(whole), "the lines before the checkpoint are kept with it"
    assert [log.step for log in whole.losses] == [1, 3, 6, 8, 9, 12, 13]
    pair = [load_model(str(tmp_path / name)).state_dict() for name in ("whole", "part")]
    assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])


def test_a_truncated_checkpoint_is_named_and_refused(config, tmp_path: Path) -> None:
    run(config(save_every=2, max_steps=2))
    file = tmp_path / "out" / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    told = r"checkpoint-2/optimizer\.pt: it is damaged: it has [\d,]+ bytes instead of [\d,]+; remove"
    with pytest.raises(BadArtifact, match=told):
        run(config(save_every=2, max_steps=4), resume=True)


def test_a_signal_saves_and_says_how_to_go_on(config, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        run(config(max_steps=6), go_on="cdm distill run.yaml --resume", on_progress=stop)
    assert signal.getsignal(signal.SIGINT) is before
    step = int(str(last_checkpoint(tmp_path / "out")).rpartition("-")[2])
    assert step in (2, 3)
    assert f"step {step} of 6 is kept in {tmp_path / 'out' / f'checkpoint-{step}'}" in str(caught.value)
    assert str(caught.value).endswith("go on with: cdm distill run.yaml --resume")
    resumed = run(config(max_steps=6), resume=True)
    whole = run(config({"output": str(tmp_path / "whole")}, max_steps=6))
    assert losses(resumed) == losses(whole)


def test_adapters_are_trained_merged_and_kept(config, tmp_path: Path) -> None:
    result = run(config(lora={"rank": 4}, max_steps=12, lr=1e-2))
    ce = [log.ce for log in result.losses]
    assert sum(ce[-3:]) < sum(ce[:3])
    before, after = load_model(config().student), load_model(str(result.output))
    changed = {
        name
        for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert changed
    assert not any("embed" in name or "norm" in name for name in changed), "only linear layers have adapters"
    assert (result.output / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(BadOption, match=r"train\.lora\.targets"):
        run(config(lora={"targets": ["no_such_module"]}), overwrite=True)


def test_gradient_checkpointing_changes_no_loss(config, tmp_path: Path) -> None:
    plain = run(config(max_steps=2))
    spared = run(config({"output": str(tmp_path / "spared")}, max_steps=2, gradient_checkpointing=True))
    for one, two in zip(losses(plain), losses(spared), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_mixed_precision_trains(config) -> None:
    result = run(config(dtype="bfloat16", max_steps=6))
    assert result.losses[-1].ce < result.losses[0].ce
    assert load_model(str(result.output)).dtype == torch.float32


def test_mixed_precision_makes_no_float32_copy_of_the_logits(config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    loss_sums = trainer_module.loss_sums

    def look(logits: torch.Tensor, *others: Any) -> Any:
        seen.append(logits.dtype)
        return loss_sums(logits, *others)

    monkeypatch.setattr(trainer_module, "loss_sums", look)
    run(config(dtype="bfloat16", max_steps=2))
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_event_files_have_the_parts_of_the_loss(config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(config(report_to=["tensorboard"]))
    (events,) = {path.parent for path in result.output.rglob("events.out.tfevents.*")}
    reader = EventAccumulator(str(events))
    reader.Reload()
    tags = reader.Tags()["scalars"]
    assert {"train/loss", "train/ce", "train/kd", "train/matched_mass"} <= set(tags)
    assert {"train/padding", "train/tokens_per_second", "train/seconds_teacher"} <= set(tags)
    assert [event.value for event in reader.Scalars("train/kd")] == pytest.approx(
        [log.teachers[0].kd for log in result.losses]
    )


def test_fields_of_training_arguments_are_handed_on(config, tmp_path: Path) -> None:
    made = training_arguments(config(trainer={"optim": "adafactor", "adam_beta2": 0.98}), tmp_path)
    assert (made.optim, made.adam_beta2, made.learning_rate) == ("adafactor", 0.98, 3e-3)
    plain, other = (
        run(config(max_steps=2)),
        run(config({"output": str(tmp_path / "other")}, max_steps=2, trainer={"optim": "sgd"})),
    )
    assert plain.losses[0].loss == other.losses[0].loss
    assert plain.losses[1].loss != other.losses[1].loss


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"learning_rate": 1e-3}, "'learning_rate'; give the run's own setting train.lr"),
        (
            {"eval_strategy": "epoch"},
            "'eval_strategy'; give the run's own setting eval.every",
        ),
        ({"fp16": True}, "'fp16'; give it without this field: losses of distillation overflow"),
        ({"optimm": "sgd"}, "unknown field of TrainingArguments 'optimm'; did you mean optim?"),
        ({"optim": "adamm"}, "fields that transformers takes: "),
        ({"lr_scheduler_type": "up"}, "fields that transformers takes: "),
    ],
)
def test_fields_that_a_run_cannot_have(config, trainer: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((BadOption, UnknownName)) as caught:
        run(config({"data": {"path": "none.jsonl"}}, trainer=trainer))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_student_is_uploaded_when_it_is_written(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, ...]] = []

    def uploaded(folder: Path, repository: str, *, private: bool | None) -> str:
        assert (folder / "model.safetensors").exists()
        done.append((repository, str(private)))
        return f"there/{repository}"

    monkeypatch.setattr(run_module, "check_login", lambda: done.append(("login",)))
    monkeypatch.setattr(run_module, "upload", uploaded)
    trainer: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "me/student", "hub_private_repo": True}
    result = run(config(max_steps=1, trainer=trainer))
    assert result.uploaded == "there/me/student"
    assert done == [("login",), ("me/student", "True")]
    with pytest.raises(BadOption, match=r"hub_model_id` is None; give the repository to upload to"):
        run(config({"output": str(tmp_path / "b")}, trainer={"push_to_hub": True}))


def test_a_tracker_that_is_not_there(config) -> None:
    with pytest.raises(BadOption, match="'trackio'; give one that is installed, or run: pip install trackio"):
        run(config(report_to=["trackio"]))


def test_an_attention_that_is_not_there(config) -> None:
    with pytest.raises(
        BadOption, match=r"attn_implementation.* is 'flash_attention_2'; give another, such as"
    ):
        run(config(attn_implementation="flash_attention_2", max_steps=1))
    assert run(config(attn_implementation="eager", max_steps=1), overwrite=True).steps == 1


def test_weights_in_bfloat16(config) -> None:
    made = config(weights="bfloat16", max_steps=2)
    result = run(made)
    assert load_model(made.output).dtype == torch.float32
    with safe_open(Path(made.output) / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert result.losses[-1].loss > 0


def test_auto_is_float32_where_there_is_no_gpu(config) -> None:
    assert config().train.dtype == "auto"
    assert config().train.mixed_dtype == "float32"


def test_equal_tokenizers_work_and_say_that_kl_would_do(config, tiny) -> None:
    result = run(config({"teachers": [{"model": tiny.student, "top_k": 40}]}, max_steps=1))
    assert any("kl would do" in warning for warning in result.warnings)
    (teacher,) = result.losses[0].teachers
    assert teacher.pairs == pytest.approx(40), "each candidate has its like"
    assert teacher.kd == pytest.approx(0, abs=1e-4), "the student is its own teacher"


def test_a_method_for_one_tokenizer_refuses_two(config, tiny) -> None:
    with pytest.raises(BadOption, match="one for different tokenizers"):
        run(config({"teachers": [{"model": tiny.teacher, "method": "kl"}]}))


def test_the_papers_preset_takes_the_entropies_of_the_models(config, tiny) -> None:
    stages: set[str] = set()
    result = run(
        config({"preset": "paper", "teachers": [{"model": tiny.teacher, "top_k": 40}]}, max_steps=2),
        on_progress=lambda progress: stages.add(progress.stage),
    )
    assert "entropies" in stages
    assert result.losses[0].teachers[0].aligned_share > 0.1


def test_output_rules(config, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    with pytest.raises(OutputExists) as caught:
        run(config())
    assert "`resume`" not in str(caught.value)
    with pytest.raises(FileProblem, match="no whole checkpoint"):
        run(config(), resume=True)
    run(config(max_steps=2, save_every=1), overwrite=True)
    assert last_checkpoint(output) == output / "checkpoint-2"
    assert (output / "mine.txt").read_text() == "keep me"
    with pytest.raises(OutputExists, match="`resume`"):
        run(config())
    run(config(max_steps=1), overwrite=True)
    assert last_checkpoint(output) == output / "checkpoint-1", "the checkpoints of the run before are gone"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem):
        run(config({"output": str(tmp_path / "file")}))
    with pytest.raises(FileProblem):
        run(config({"output": "/proc/none/out"}))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"train": {"device": "cuda"}}, BadOption),
        ({"data": {"path": "none.jsonl"}}, FileProblem),
        ({"data": {"path": "sample:tain"}}, UnknownName),
        ({"data": {"max_length": 4}}, NothingToTrain),
    ],
)
def test_a_run_that_fails_leaves_nothing(config, settings: dict[str, Any], error: type[Exception]) -> None:
    if "device" in settings.get("train", {}) and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    chosen = config(settings)
    with pytest.raises(error):
        run(chosen)
    assert not Path(chosen.output).exists()


def test_more_candidates_than_ids_are_refused(config, tiny) -> None:
    with pytest.raises(BadOption, match=r"`top_k` is 400; give at most \d+: the smaller"):
        run(config({"teachers": [{"model": tiny.teacher, "top_k": 400}]}))


def test_rows_longer_than_the_model_are_refused(config, rows_file: Path) -> None:
    rows_file.write_text(json.dumps({"prompt": "a", "completion": "q " * 3000}) + "\n", encoding="utf-8")
    with pytest.raises(BadOption, match="max_length"):
        run(config({"data": {"path": str(rows_file), "max_length": 9000}}))


@pytest.mark.parametrize(("side", "refused"), [("teacher", True), ("student", False)])
def test_each_model_is_asked_for_the_positions_of_its_own_side(
    config, tiny, rows_file: Path, tmp_path: Path, side: str, refused: bool
) -> None:
    """The other side may be longer than a model has positions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    completion = "dog. " * 20  # one token on the student's side, two on the teacher's
    rows_file.write_text(json.dumps({"prompt": "a", "completion": completion}) + "\n", encoding="utf-8")
    lengths = {
        name: len(load_tokenizer(folder).view.encode(f"a\n{completion}")) + 2
        for name, folder in (("student", tiny.student), ("teacher", tiny.teacher))
    }
    short = tmp_path / side
    tokenizer = AutoTokenizer.from_pretrained(getattr(tiny, side))
    model = AutoModelForCausalLM.from_pretrained(getattr(tiny, side))
    model.config.max_position_embeddings = lengths[side] - int(refused)
    model.save_pretrained(short)
    tokenizer.save_pretrained(short)
    named = (
        {"student": str(short)} if side == "student" else {"teachers": [{"model": str(short), "top_k": 40}]}
    )
    chosen = config({"data": {"path": str(rows_file)}} | named, max_steps=1)
    if not refused:
        assert run(chosen).steps == 1
        return
    with pytest.raises(
        BadOption, match=f"`max_length` is {lengths[side]}; give at most {lengths[side] - 1}: {short}"
    ):
        run(chosen)


def test_left_out_rows_are_said(config, rows_file: Path) -> None:
    rows = [{"prompt": "a", "completion": text} for text in ("the cat", "", "the dog " * 40)]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = run(config({"data": {"path": str(rows_file), "max_length": 30}}, max_steps=1))
    assert (result.rows.trained, result.rows.empty, result.rows.cut) == (2, 1, 1)
    assert len(result.warnings) == 2


@pytest.mark.parametrize("log_every", [1, 100])
def test_logits_that_are_not_finite_stop_the_run_and_name_the_row(
    config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log_every: int
) -> None:
    """Whether lines are logged or not: a checkpoint of such weights is never written."""
    real, poisoned = trainer_module.logits_at, []

    def logits_at(model: Any, head: Any, at: torch.Tensor, **inputs: Any) -> torch.Tensor:
        logits = real(model, head, at, **inputs)
        if model.training:
            poisoned.append(0)
            if len(poisoned) == 3:
                logits = logits.index_fill(0, torch.tensor([len(logits) - 1]), torch.nan)  # of the last row
        return logits

    monkeypatch.setattr(trainer_module, "logits_at", logits_at)
    with pytest.raises(NotFinite, match=r"the loss of row \d+ is not finite at step 3, .*checkpoint-2"):
        run(config(save_every=2, log_every=log_every))
    output = tmp_path / "out"
    assert last_checkpoint(output) == output / "checkpoint-2"
    assert not (output / "config.json").exists()


def test_a_signal_that_is_not_finite_stops_the_run(config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Local.signal

    def signal(self: Local, batch: Any, request: Any) -> Any:
        found = real(self, batch, request)
        found.top.logprobs.fill_(torch.nan)
        return found

    monkeypatch.setattr(Local, "signal", signal)
    with pytest.raises(NotFinite, match=r"the loss of rows \d+, .* at step 1, no checkpoint was due"):
        run(config())


def test_a_full_disk_is_said_and_the_run_can_go_on_from_its_checkpoint(config, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def full(model: Any, tokenizer: Any, folder: Path, **_: Any) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "save_model", full)
        with pytest.raises(FileProblem, match="No space left"):
            run(config())
    assert [path.name for path in output.iterdir()] == ["checkpoint-4"]
    run(config(), resume=True)
    load_model(str(output))


def test_a_plan_measures_and_writes_nothing(config, tiny, tmp_path: Path) -> None:
    chosen = config(max_steps=None, epochs=3, batch_size=5, grad_accumulation=2)
    planned = plan(chosen)
    assert not (tmp_path / "out").exists()
    assert (planned.steps_an_epoch, planned.steps, planned.rows_per_step) == (3, 9, 10)
    assert planned.rows.trained == planned.looked_at == 24
    (measured,) = planned.teachers
    result = run(config(batch_size=24, max_steps=1))
    (teacher,) = result.losses[0].teachers
    assert measured.matched_mass == pytest.approx(teacher.matched_mass, abs=1e-5)
    assert measured.aligned_share == pytest.approx(teacher.aligned_share)
    assert (planned.ce, measured.kd) == pytest.approx((result.losses[0].ce, teacher.kd), abs=1e-5)
    weights = sum(p.numel() for p in load_model(tiny.student).parameters()) * 4
    assert planned.memory["student weights"] == weights
    assert planned.tokens_an_epoch == result.tokens
