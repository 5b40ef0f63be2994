"""Parts of a step, timed."""

from __future__ import annotations

import pytest
import torch

from cdm_toolkit.distill.step_times import StepTimes


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> StepTimes:
    """Give times by a clock that goes on by a second at each look."""
    seconds = iter(range(100))
    monkeypatch.setattr("cdm_toolkit.distill.step_times.perf_counter", lambda: next(seconds))
    return StepTimes(torch.device("cpu"))


def test_a_part_lasts_until_the_next(times: StepTimes) -> None:
    for part in ("sampling", "data", "student", "teacher", "student", "optimizer", None, "data", None):
        times.begin(part)
    assert times.take() == {"data": 2, "teacher": 1, "student": 2, "optimizer": 1, "sampling": 1}


def test_what_is_taken_is_gone_and_what_runs_is_not(times: StepTimes) -> None:
    times.begin("data")
    assert sum(times.take().values()) == 0
    times.begin("student")
    assert times.take()["data"] == 1
    times.begin(None)
    times.begin(None)
    assert times.take() == {"data": 0, "teacher": 0, "student": 1, "optimizer": 0, "sampling": 0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_part_has_the_time_of_the_device() -> None:
    """The host is done at once; the device is not."""
    times = StepTimes(torch.device("cuda"))
    big = torch.randn(4096, 4096, device="cuda")
    times.begin("teacher")
    for _ in range(50):
        big = big @ big / 64
    times.begin("student")
    times.begin(None)
    taken = times.take()
    assert taken["teacher"] > 10 * taken["student"]
