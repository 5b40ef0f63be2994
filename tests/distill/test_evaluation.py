"""Held-out rows, evaluated while a student trains."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cdm_toolkit.compare.measure import Heldout as HeldoutText
from cdm_toolkit.compare.measure import score_model
from cdm_toolkit.distill.jsonl import write_rows
from cdm_toolkit.distill.logs import EvalLog
from cdm_toolkit.distill.output_folder import check_seal, last_checkpoint
from cdm_toolkit.distill.plan import plan
from cdm_toolkit.distill.prepare import Progress, prepare
from cdm_toolkit.distill.run import RunResult, run
from cdm_toolkit.distill.settings import DistillConfig, from_mapping
from cdm_toolkit.distill.sources import Rows, read_rows
from cdm_toolkit.distill.trainer import DistillTrainer
from cdm_toolkit.distill.training_arguments import training_arguments
from cdm_toolkit.distill.write_teacher_cache import CacheSettings, write_cache
from cdm_toolkit.errors import BadArtifact, BadOption, BadRow, BadSettings, FileProblem
from cdm_toolkit.kd.rows import Row

from .conftest import sentences

RISING: dict[str, Any] = {"lr": 1.0, "warmup_steps": 8, "schedule": "constant_with_warmup"}
"""A learning rate that does good in the first two steps, and then harm."""


@pytest.fixture
def held(tmp_path: Path) -> str:
    """Write rows that no run trains on."""
    texts = sentences(12, seed=5)
    rows = [Row(n, a, b) for n, (a, b) in enumerate(zip(texts[:6], texts[6:], strict=True), 1)]
    write_rows(tmp_path / "held.jsonl", rows)
    return str(tmp_path / "held.jsonl")


def trainer_of(config: DistillConfig, folder: Path) -> DistillTrainer:
    prepared = prepare(config, Rows(config.data.all_sources), lambda _: None)
    return prepared.trainer(training_arguments(config, folder))


def without_time(evaluations: tuple[EvalLog, ...]) -> list[EvalLog]:
    return [replace(log, seconds=0) for log in evaluations]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_evaluation_does_not_change_training(config, held: str, tmp_path: Path) -> None:
    """Weights, state of the optimizer and random numbers have the same bits, also where dropout draws some."""
    train = {"lora": {"rank": 4, "dropout": 0.3}, "save_every": 6, "max_steps": 6, "log_every": 2}
    plain = run(config({"output": str(tmp_path / "plain")}, **train))
    watched = run(config({"output": str(tmp_path / "watched"), "eval": {"path": held, "every": 2}}, **train))
    assert [log.step for log in watched.evaluations] == [2, 4, 6]
    assert [(log.loss, log.ce, log.grad_norm) for log in plain.losses] == [
        (log.loss, log.ce, log.grad_norm) for log in watched.losses
    ]
    one, two = (tmp_path / name / "checkpoint-6" for name in ("plain", "watched"))
    for file in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_evaluation_leaves_random_numbers_and_the_mode_as_they_were(
    config, held: str, tmp_path: Path
) -> None:
    trainer = trainer_of(config({"eval": held}), tmp_path)
    trainer.model.register_forward_hook(
        lambda *_: (torch.rand(1), random.random(), np.random.random(), None)[-1]
    )
    trainer.model.train()

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    trainer.evaluation()
    assert states() == before
    assert all(module.training for module in trainer.model.modules())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer._sums.sum() == 0
    assert not trainer._unseen


def test_an_evaluation_is_the_objective_over_all_rows(config, held: str, tiny, tmp_path: Path) -> None:
    """Whatever the batches: row by row the sums are the same, CE is that of transformers."""
    both = [
        {"model": tiny.teacher, "top_k": 40, "weight": 0.25},
        {"model": tiny.student, "method": "kl", "top_k": 40, "weight": 0.75},
    ]
    trainer = trainer_of(config({"teachers": both, "alpha": 0.3, "eval": held}), tmp_path)
    found = trainer.evaluation()
    assert found.loss == pytest.approx(
        0.3 * found.ce + 0.7 * (0.25 * found.teachers[0].kd + 0.75 * found.teachers[1].kd), rel=1e-5
    )
    model, features = trainer.model.eval(), trainer.heldout.features
    ce = kd = mass = groups = labels = 0.0
    for row in features:
        ids = torch.tensor(row.student_ids)[None].long()
        targets = ids.clone()
        targets[:, : row.label_from] = -100
        with torch.no_grad():
            ce += float(model(ids, labels=targets).loss) * row.labels
            sums = trainer.loss_sums(model, trainer._collator([row]))
        kd, mass = kd + float(sums.kd[0].kd), mass + float(sums.kd[0].matched_mass)
        labels, groups = labels + row.labels, groups + len(row.teachers[0].groups)
    assert (found.ce, found.teachers[0].kd) == pytest.approx((ce / labels, kd / groups), rel=1e-5)
    assert found.teachers[0].matched_mass == pytest.approx(mass / groups, rel=1e-5)
    assert found.teachers[0].aligned_share == groups / labels
    assert found.teachers[1].kd == pytest.approx(0, abs=1e-5), "the student is its own teacher"


def test_each_source_has_its_alpha(config, held: str, tmp_path: Path) -> None:
    lines = Path(held).read_text().splitlines(keepends=True)
    for name, some in (("a", lines[:2]), ("b", lines[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))

    def loss(*alphas: float) -> float:
        sources = [
            {"path": str(tmp_path / f"{name}.jsonl"), "alpha": alpha}
            for name, alpha in zip("ab", alphas, strict=True)
        ]
        return trainer_of(config({"eval": sources}), tmp_path).evaluation().loss

    none = loss(0, 0)
    expected = none + 0.2 * (loss(1, 0) - none) + 0.9 * (loss(0, 1) - none)
    assert loss(0.2, 0.9) == pytest.approx(expected, rel=1e-5)
    assert loss(0.8, 0.8) == trainer_of(config({"eval": held}), tmp_path).evaluation().loss


def test_bits_per_byte_are_those_of_a_study(config, held: str, tiny, tmp_path: Path) -> None:
    """Where no token lies across the start of a completion, and no row is cut."""
    found = trainer_of(config({"teachers": [], "eval": held}), tmp_path).evaluation()
    text = HeldoutText.make(tmp_path / "text", {"held": read_rows(held)}, tiny.teacher, divergence=False)
    measured = score_model(tiny.student, text)["held"]
    assert found.bits_per_byte == pytest.approx(measured.bits / measured.scored_bytes, rel=1e-5)


@pytest.mark.parametrize("metric", ["loss", "ce", "bits_per_byte"])
def test_the_student_is_the_best_checkpoint(config, held: str, tmp_path: Path, metric: str) -> None:
    """Its evaluation, made anew, is what was logged, and the least; the last weights are worse."""
    made = config({"eval": {"path": held, "every": 1, "metric": metric}}, max_steps=4, save_every=0, **RISING)
    result = run(made)
    values = [getattr(log, metric) for log in result.evaluations]
    assert getattr(result.best, metric) == min(values) < values[-1]
    assert [log.is_best for log in result.evaluations] == [
        all(value < before for before in values[:nth]) for nth, value in enumerate(values)
    ]
    again = trainer_of(made.model_copy(update={"student": str(result.output)}), tmp_path).evaluation()
    assert (again.loss, again.ce, again.bits_per_byte) == pytest.approx(
        (result.best.loss, result.best.ce, result.best.bits_per_byte), rel=1e-6
    )
    best = result.output / f"checkpoint-{result.best.step}"
    check_seal(best)
    kept, written = weights(best), weights(result.output)
    assert all(torch.equal(kept[name], written[name]) for name in kept)
    card = (result.output / "README.md").read_text()
    assert f"| weights | of step {result.best.step}, the best of 4 evaluations |" in card
    facts = json.loads((result.output / "provenance.json").read_text())
    assert facts["step_of_weights"] == result.best.step
    assert [log["step"] for log in facts["evaluations"]] == [1, 2, 3, 4]


def test_the_best_adapters_are_merged(config, held: str, tmp_path: Path) -> None:
    made = config(
        {"eval": {"path": held, "every": 1}},
        max_steps=8,
        save_every=0,
        lora={"rank": 4},
        **RISING | {"lr": 30},
    )
    result = run(made)
    assert result.best.step < result.steps
    again = trainer_of(
        made.model_copy(
            update={"student": str(result.output), "train": made.train.model_copy(update={"lora": None})}
        ),
        tmp_path,
    ).evaluation()
    assert again.loss == pytest.approx(result.best.loss, rel=1e-4)


def test_a_run_without_a_better_evaluation_stops_early(config, held: str) -> None:
    made = config({"eval": {"path": held, "every": 1, "patience": 2}}, max_steps=40, **RISING)
    result = run(made)
    assert result.stopped_early
    assert result.steps == result.best.step + 2 == len(result.evaluations) < 40
    patient = run(
        config({"eval": {"path": held, "every": 1, "patience": 3}}, max_steps=4, **RISING), overwrite=True
    )
    assert (patient.steps, patient.stopped_early) == (4, False)


def test_a_resumed_run_keeps_evaluations_and_the_best(config, held: str, tmp_path: Path) -> None:
    """The best is before the checkpoint that is resumed from, whose other files alone are left."""

    def made(name: str) -> DistillConfig:
        settings = {"output": str(tmp_path / name), "eval": {"path": held, "every": 1, "patience": 4}}
        return config(settings, max_steps=40, save_every=4, **RISING)

    whole = run(made("whole"))
    assert whole.stopped_early
    best, later = whole.best.step, 4
    assert best < later < whole.steps == best + 4
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    for path in part.iterdir():
        if path.name not in {f"checkpoint-{best}", f"checkpoint-{later}"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "whole" / f"checkpoint-{best}").rename(tmp_path / "moved")
    resumed = run(made("part"), resume=True)
    assert without_time(resumed.evaluations) == without_time(whole.evaluations)
    assert replace(resumed.best, seconds=0) == replace(whole.best, seconds=0)
    one, two = weights(tmp_path / "whole"), weights(part)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (resumed.steps, resumed.stopped_early) == (whole.steps, True)


def test_rotation_keeps_the_best_and_the_last(config, held: str, tmp_path: Path) -> None:
    made = config({"eval": {"path": held, "every": 1}}, max_steps=5, save_every=1, **RISING)
    result = run(made)
    left = {path.name for path in result.output.glob("checkpoint-*")}
    assert left == {f"checkpoint-{result.best.step}", "checkpoint-5"}


def test_an_old_checkpoint_goes_when_the_new_one_is_whole(
    config, held: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process that is killed while it writes a better checkpoint leaves the best before it, and the last."""
    from cdm_toolkit.distill import trainer as trainer_module

    seal = trainer_module.seal_checkpoint

    def killed(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-3":
            raise KeyboardInterrupt
        seal(checkpoint)

    made = config({"eval": {"path": held, "every": 1}}, max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "seal_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run(made)
    output = tmp_path / "out"
    assert last_checkpoint(output) == output / "checkpoint-2"
    result = run(made, resume=True)
    assert [log.step for log in result.evaluations] == [1, 2, 3, 4]
    assert result.best.step == 4


def test_a_best_checkpoint_that_is_damaged_or_gone_is_told(config, held: str, tmp_path: Path) -> None:
    made = config({"eval": {"path": held, "every": 1}}, max_steps=4, save_every=4, **RISING)
    result = run(made)
    best = result.output / f"checkpoint-{result.best.step}"
    file = best / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(
        BadArtifact, match=rf"{best.name}/model\.safetensors: it is damaged.*go on without `eval`"
    ):
        run(made, resume=True)
    file.write_bytes(whole)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(held).read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(BadArtifact, match="its evaluations are of other held-out rows"):
        run(made.model_copy(update={"eval": made.eval.model_copy(update={"path": str(other)})}), resume=True)
    assert run(made, resume=True).best == result.best
    shutil.rmtree(best)
    with pytest.raises(FileProblem, match=best.name):
        run(made, resume=True)


def test_evaluations_are_told_and_reported(config, held: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: list[Progress] = []
    made = config(
        {"eval": {"path": held, "every": 3, "limit": 5}}, max_steps=4, log_every=2, report_to=["tensorboard"]
    )
    result = run(made, on_progress=events.append)
    assert [log.step for log in result.evaluations] == [3, 4], "at the end too"
    assert [log.step for log in result.losses] == [1, 2, 3, 4], "a line before each"
    told = [event for event in events if event.stage == "evaluate"]
    assert [event.evaluation for event in told if event.evaluation] == list(result.evaluations)
    assert [(event.done, event.total) for event in told if not event.evaluation] == [(1, 2), (2, 2)] * 2
    (folder,) = {path.parent for path in result.output.rglob("events.out.tfevents.*")}
    reader = EventAccumulator(str(folder))
    reader.Reload()
    for name in ("loss", "ce", "bits_per_byte"):
        values = [event.value for event in reader.Scalars(f"eval/{name}")]
        assert values == pytest.approx([getattr(log, name) for log in result.evaluations])
    kd = [event.value for event in reader.Scalars("eval/kd")]
    assert kd == pytest.approx([log.teachers[0].kd for log in result.evaluations])


# A share of the data


def test_a_share_is_not_trained_on(config, tiny, tmp_path: Path) -> None:
    made = config({"eval": {"share": 0.3, "every": 2}}, batch_size=24, max_steps=2)
    result, planned = run(made), plan(made)
    assert result.rows.read == 24 == result.rows.trained + result.rows.held_out
    assert (planned.rows, planned.held_out, planned.evaluations) == (result.rows, result.rows.held_out, 1)
    assert "held out" in str(result.rows)
    prepared = prepare(made, Rows(made.data.all_sources), lambda _: None)
    trained, held_out = ({row.row for row in each} for each in (prepared.features, prepared.heldout.features))
    assert trained | held_out == set(range(1, 25))
    assert not trained & held_out
    assert len(held_out) == result.rows.held_out > 0
    assert result.losses[0].tokens == prepared.features.student_lengths.sum()
    lines = Path(tiny.data).read_text().splitlines(keepends=True)
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(lines[number - 1] for number in sorted(trained)))
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(lines[number - 1] for number in sorted(held_out)))
    apart = run(
        config(
            {"output": str(tmp_path / "apart"), "data": {"path": str(alone)}, "eval": {"path": str(rest)}},
            batch_size=24,
            max_steps=2,
        )
    )
    assert [log.loss for log in apart.losses] == pytest.approx([log.loss for log in result.losses], rel=1e-6)
    assert apart.best.loss == pytest.approx(result.best.loss, rel=1e-6)
    assert apart.best.bits_per_byte == pytest.approx(result.best.bits_per_byte, rel=1e-6)


def test_copies_of_a_text_stay_on_one_side(config, tiny, tmp_path: Path) -> None:
    lines = Path(tiny.data).read_text().splitlines(keepends=True)
    data = tmp_path / "twice.jsonl"
    data.write_text("".join([*lines, *(line.replace(" the ", "  the ") for line in lines)]))
    for limit in (None, 5):
        made = config({"data": {"path": str(data)}, "eval": {"share": 0.3, "limit": limit}})
        prepared = prepare(made, Rows(made.data.all_sources), lambda _: None)
        held_out = {row.row for row in prepared.heldout.features}
        assert held_out == {(number + 23) % 48 + 1 for number in held_out}, "each with its copy"
        assert not held_out & {row.row for row in prepared.features}
        assert limit is None or len(held_out) <= limit


def test_a_row_that_is_trained_on_is_refused(config, held: str, tiny, tmp_path: Path) -> None:
    trained = json.loads(Path(tiny.data).read_text().splitlines()[6])
    with Path(held).open("a") as stream:
        stream.write(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f" {trained['prompt']}"},
                        {"role": "assistant", "content": trained["completion"]},
                    ]
                }
            )
            + "\n"
        )
    Path(held).write_text(Path(held).read_text().splitlines(keepends=True)[-1])
    with pytest.raises(
        BadRow, match=r"held\.jsonl, row 1: it is trained on, as row 7 of .*rows\.jsonl; take them"
    ):
        run(config({"eval": held}))
    assert not (tmp_path / "out").exists()


def test_a_cached_teacher_knows_a_share_and_no_other_rows(config, held: str, tiny, tmp_path: Path) -> None:
    write_cache(
        CacheSettings(model=tiny.teacher, data=tiny.data, output=str(tmp_path / "cache"), k=60, device="cpu")
    )
    cached = {"teachers": [{"model": tiny.teacher, "top_k": 40, "cache": str(tmp_path / "cache")}]}
    share = {"eval": {"share": 0.3}}
    online, offline = (
        trainer_of(config(settings), tmp_path).evaluation() for settings in (share, cached | share)
    )
    assert offline.loss == pytest.approx(online.loss, rel=1e-3)
    assert offline.teachers[0].kd == pytest.approx(online.teachers[0].kd, rel=1e-2)
    with pytest.raises(BadSettings, match=r"eval\.metric is loss, .* give ce or bits_per_byte, or a share"):
        config(cached | {"eval": held})
    result = run(config(cached | {"eval": {"path": held, "metric": "ce", "every": 2}}))
    assert [(log.loss, log.teachers) for log in result.evaluations] == [(None, ())] * 2
    assert result.best.ce == min(log.ce for log in result.evaluations)


# Bad input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"every": 50}, "eval: path is missing, or sources, or a share of the data"),
        ({"patience": 3}, "eval: path is missing, or sources, or a share of the data"),
        ({"share": 0}, "eval.share is 0: give a number above 0"),
        ({"share": 1}, "eval.share is 1: give a number below 1"),
        ({"share": -0.1}, "eval.share is -0.1: give a number above 0"),
        ({"share": 0.1, "path": "x.jsonl"}, "eval: path beside share: that is of the data's own rows"),
        ({"share": 0.1, "shuffle": True, "alpha": 0.5}, "eval: alpha, shuffle beside share"),
        ({"path": "x.jsonl", "weight": 2}, "eval: weight is of no use: each row is evaluated once"),
        ({"path": "x.jsonl", "patience": 0}, "eval.patience is 0: give a number of at least 1"),
        ({"path": "x.jsonl", "metric": "kd"}, "eval.metric is 'kd': give one of loss, ce, bits_per_byte"),
        ({"path": "x.jsonl", "max_length": 9}, "eval.max_length is no setting"),
        ([{"path": "x.jsonl"}, {"pth": "y"}], "eval.sources.1.pth is no setting, did you mean path?"),
    ],
)
def test_faults_of_settings(given: Any, said: str) -> None:
    with pytest.raises(BadSettings) as caught:
        from_mapping({"student": "s", "data": "d.jsonl", "output": "o", "eval": given})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said", "error"),
    [
        ({"share": 0.000001}, "`eval.share` is 1e-06; give more: it has none of 24 rows", BadOption),
        ({"share": 0.999999}, "`eval.share` is 0.999999; give less: no row is left to train on", BadOption),
        ({"path": "none.jsonl"}, "none.jsonl: there is no such file", FileProblem),
    ],
)
def test_rows_that_are_not_there(
    config, settings: Any, said: str, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        run(config({"eval": settings}))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_rows_of_which_none_can_be_evaluated(config, held: str) -> None:
    Path(held).write_text(json.dumps({"prompt": "a", "completion": ""}) + "\n")
    with pytest.raises(
        FileProblem, match=r"held\.jsonl: none of its rows can be evaluated: 1 read, .* 1 empty"
    ):
        run(config({"eval": held}))


def test_held_out_rows_that_are_left_out_are_said(config, held: str) -> None:
    with Path(held).open("a") as stream:
        stream.write(json.dumps({"prompt": "a", "completion": ""}) + "\n")
    result: RunResult = run(config({"eval": held}, max_steps=1))
    assert "held-out rows: of 7 rows 1 empty and 0 too long ones were left out" in result.warnings


def test_fields_of_an_evaluation_are_settings_of_the_run(config, held: str, tmp_path: Path) -> None:
    made = training_arguments(config({"eval": held}, trainer={"per_device_eval_batch_size": 32}), tmp_path)
    assert (made.eval_batch_size, made.eval_steps, made.metric_for_best_model) == (32, 100, "loss")
    with pytest.raises(BadOption, match=r"'eval_steps'; give the run's own setting eval\.every"):
        training_arguments(config({"eval": held}, trainer={"eval_steps": 3}), tmp_path)
