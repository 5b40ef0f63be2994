"""Whole runs, on tiny fresh models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cdm_toolkit.distill import run as run_module
from cdm_toolkit.distill.config import DistillConfig
from cdm_toolkit.distill.output import last_checkpoint
from cdm_toolkit.distill.run import Progress, RunResult, run
from cdm_toolkit.errors import BadOption, FileProblem, NotFinite, NothingToTrain, OutputExists
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tiny) -> None:
    """Keep the neighbour tables of tiny tokenizers out of the user's cache."""
    monkeypatch.setenv("CDM_CACHE", str(Path(tiny.data).parent / "cache"))


@pytest.fixture
def config(tiny, tmp_path: Path):
    """Give the function that makes a config of a short run."""

    def make(**settings: Any) -> DistillConfig:
        chosen: dict[str, Any] = {
            "teacher": tiny.teacher,
            "student": tiny.student,
            "data": tiny.data,
            "output": str(tmp_path / "out"),
            "batch_size": 4,
            "max_steps": 4,
            "top_k": 40,
            "learning_rate": 3e-3,
            "log_every": 1,
        }
        return DistillConfig(**chosen | settings)

    return make


def losses(result: RunResult) -> list[tuple[float, ...]]:
    return [(log.step, log.loss, log.ce, log.kd, log.grad_norm) for log in result.losses]


def test_writes_a_student_that_loads_with_equal_logits(config, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Any] = []
    save = run_module.save_model
    monkeypatch.setattr(
        run_module, "save_model", lambda model, *rest: (trained.append(model), save(model, *rest))
    )
    events: list[Progress] = []
    result = run(config(), on_progress=events.append)

    assert result.steps == 4
    assert [log.step for log in result.losses] == [1, 2, 3, 4]
    assert result.losses[-1].ce < result.losses[0].ce
    last = result.losses[-1]
    assert last.loss == pytest.approx(0.5 * last.ce + 0.5 * last.kd, rel=1e-5)
    assert last.kd > 0
    assert 0.1 < last.matched_mass <= 1
    assert 0.1 < last.aligned_share <= 1
    assert {event.stage for event in events} >= {"align", "load", "neighbours", "train", "save"}
    assert [(e.done, e.total) for e in events if e.stage == "train"] == [(i, 4) for i in (1, 2, 3, 4)]

    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        expected = trained[0].eval()(ids).logits
        loaded = load_model(str(result.output))
        assert torch.equal(loaded(ids).logits, expected)
    assert loaded.config.use_cache
    fingerprint = load_tokenizer(str(result.output)).view.fingerprint
    facts = json.loads((result.output / "receipt.json").read_text(encoding="utf-8"))
    assert facts["fingerprints"]["student tokenizer"] == fingerprint
    assert (facts["steps"], facts["rows"]["trained"], facts["config"]["method"]) == (4, 24, "cdm")
    assert not list(result.output.glob(".*")), "nothing half-written stays"


def test_same_seed_same_losses(config, tmp_path: Path) -> None:
    first, second = (run(config(output=str(tmp_path / name))) for name in "ab")
    assert losses(first) == losses(second)
    other = run(config(output=str(tmp_path / "c"), seed=1))
    assert losses(other) != losses(first)


def test_accumulation_and_batches_agree(config, tmp_path: Path) -> None:
    """A step over 4 rows is the same as one batch, as two of 2, and as four of 1."""
    runs = [
        run(
            config(
                output=str(tmp_path / str(size)), batch_size=size, grad_accumulation=4 // size, max_steps=3
            )
        )
        for size in (4, 2, 1)
    ]
    for other in runs[1:]:
        for one, two in zip(runs[0].losses, other.losses, strict=True):
            assert two.loss == pytest.approx(one.loss, abs=1e-5)
            assert (two.ce, two.kd) == pytest.approx((one.ce, one.kd), abs=1e-5)
            assert two.grad_norm == pytest.approx(one.grad_norm, abs=1e-4)


def test_sft_needs_no_teacher(config) -> None:
    result = run(config(method="sft", teacher=None))
    assert all(log.loss == pytest.approx(log.ce, rel=1e-6) for log in result.losses)
    assert all(log.kd == log.matched_mass == log.aligned_share == 0 for log in result.losses)


def test_resumed_run_has_the_losses_of_an_unbroken_one(config, tmp_path: Path) -> None:
    """Stopped at a checkpoint in mid-epoch, and resumed."""
    whole = run(config(output=str(tmp_path / "whole"), save_every=3, max_steps=5))
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    for path in part.iterdir():
        if path.name != "checkpoint-3":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (part / "checkpoint-4").mkdir()  # one that was cut off before it was whole
    resumed = run(config(output=str(part), save_every=3, max_steps=5, resume=True))
    assert losses(resumed) == losses(whole)[3:]
    pair = [load_model(str(tmp_path / name)).state_dict() for name in ("whole", "part")]
    assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])


def test_equal_tokenizers_work_and_say_that_kl_would_do(config, tiny) -> None:
    result = run(config(teacher=tiny.student, max_steps=1))
    assert any("plain KL would do" in warning for warning in result.warnings)
    assert result.losses[0].pairs == pytest.approx(40), "each candidate has its like"
    assert result.losses[0].kd == pytest.approx(0, abs=1e-4), "the student is its own teacher"


def test_output_rules(config, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    with pytest.raises(OutputExists) as caught:
        run(config())
    assert "--resume" not in str(caught.value)
    with pytest.raises(FileProblem, match="no whole checkpoint"):
        run(config(resume=True))
    run(config(max_steps=2, save_every=1, overwrite=True))
    assert last_checkpoint(output) == output / "checkpoint-2"
    assert (output / "mine.txt").read_text() == "keep me"
    with pytest.raises(OutputExists, match="--resume"):
        run(config())
    run(config(max_steps=1, overwrite=True))
    assert last_checkpoint(output) == output / "checkpoint-1", "the checkpoints of the run before are gone"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem):
        run(config(output=str(tmp_path / "file")))
    with pytest.raises(FileProblem):
        run(config(output="/proc/none/out"))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"device": "cuda"}, BadOption),
        ({"data": "none.jsonl"}, FileProblem),
        ({"top_k": 400}, BadOption),
        ({"max_length": 4}, NothingToTrain),
    ],
)
def test_a_run_that_fails_leaves_nothing(config, settings: dict[str, Any], error: type[Exception]) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    chosen = config(**settings)
    with pytest.raises(error):
        run(chosen)
    assert not Path(chosen.output).exists()


def test_rows_longer_than_the_model_are_refused(config, rows_file: Path) -> None:
    rows_file.write_text(json.dumps({"prompt": "a", "completion": "q " * 3000}) + "\n", encoding="utf-8")
    with pytest.raises(BadOption, match="max_length"):
        run(config(data=str(rows_file), max_length=9000))


def test_left_out_rows_are_said(config, rows_file: Path) -> None:
    rows = [{"prompt": "a", "completion": text} for text in ("the cat", "", "the dog " * 40)]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = run(config(data=str(rows_file), max_steps=1, max_length=30))
    assert (result.rows.trained, result.rows.empty, result.rows.cut) == (2, 1, 1)
    assert len(result.warnings) == 2


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cdm_toolkit.distill.trainer import DistillTrainer

    real = DistillTrainer.loss_parts

    def poisoned(self: DistillTrainer, model: Any, inputs: Any) -> Any:
        parts = real(self, model, inputs)
        return parts if self.state.global_step < 2 else type(parts)(parts.ce * torch.nan, *([parts.kd] * 3))

    monkeypatch.setattr(DistillTrainer, "loss_parts", poisoned)
    with pytest.raises(NotFinite, match=r"rows \d+.* at step 3, the last good checkpoint is .*checkpoint-2"):
        run(config(save_every=1))
    output = tmp_path / "out"
    assert last_checkpoint(output) == output / "checkpoint-2"
    assert not (output / "config.json").exists()


def test_a_full_disk_is_said_and_the_run_can_go_on_from_its_checkpoint(config, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def full(model: Any, tokenizer: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "save_model", full)
        with pytest.raises(FileProblem, match="No space left"):
            run(config())
    assert [path.name for path in output.iterdir()] == ["checkpoint-4"]
    run(config(resume=True))
    load_model(str(output))
