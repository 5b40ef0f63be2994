"""Runs whose teacher is behind a server, against runs with the same model in memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdm_toolkit.artifacts.teacher_cache import TeacherCache
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.run import run
from cdm_toolkit.distill.settings import DistillConfig
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.errors import BadArtifact, BadOption, Interrupted, ServerProblem
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.method import methods
from cdm_toolkit.teachers import scoring_client
from cdm_toolkit.teachers.scoring_client import _Server

from ..teachers.scoring_server import ScoringServer

WITHIN = 2e-5
"""Of losses: batches of another shape are summed up in another order."""


@pytest.fixture
def server(tiny) -> Iterator[ScoringServer]:
    model, tokenizer = load_model(tiny.teacher), load_tokenizer(tiny.teacher)
    scoring = ScoringServer(model, name="teacher", tokenizer=tokenizer.tokenizer, max_logprobs=200)
    with scoring:
        yield scoring


def served(tiny, server: ScoringServer, **more: Any) -> dict[str, Any]:
    """Give the settings of the teacher that the server has."""
    where = {"model": server.name, "tokenizer": tiny.teacher, "url": server.url, "engine": server.engine}
    return {"teachers": [{"top_k": 40} | where | more]}


def losses(config: DistillConfig, **more: Any) -> list[float]:
    return [log.loss for log in run(config, **more).losses]


def asked(server: ScoringServer) -> list[str]:
    """Give what was scored for rows, without what proves tokenizer and model."""
    prompts = [json.dumps(request.body["prompt"]) for request in server.scored]
    proofs = prompts[:2]
    return [prompt for prompt in prompts if prompt not in proofs]


def no_threads() -> bool:
    return not [each for each in threading.enumerate() if each.name == "scoring-client"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_run_is_the_local_teachers(tiny, config, server, tmp_path: Path, engine: str) -> None:
    server.engine, server.hold, server.order = engine, 3, "shuffled"
    one = config(served(tiny, server) | {"output": str(tmp_path / "served")})
    found, local = losses(one), losses(config({"output": str(tmp_path / "local")}))
    np.testing.assert_allclose(found, local, rtol=WITHIN)
    assert server.in_flight_max > 4, "rows of later batches are asked for ahead"
    assert no_threads()


ACROSS = [name for name, method in methods().items() if not method.same_tokenizer]


@pytest.mark.parametrize("name", ACROSS)
def test_each_method_has_the_loss_of_the_local_teacher(tiny, config, server, name: str) -> None:
    top_k = {"top_k": 40} if methods()[name].reads_top_k() else {}
    samples = {"on_policy": {"share": 1}} if methods()[name].samples_alone else {}
    try:
        local = config(samples | {"teachers": [{"model": tiny.teacher, "method": name} | top_k]})
        expected = _sums(local)
    except BadOption as error:
        pytest.skip(f"{name} is not for these tokenizers: {error}")
    teacher = served(tiny, server, method=name)["teachers"][0]
    asked = {key: teacher[key] for key in teacher if key != "top_k"} | top_k
    found = _sums(config(samples | {"teachers": [asked]}))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=WITHIN, atol=WITHIN)


def _sums(config: DistillConfig) -> list[list[float]]:
    """Give KD, matched mass and pairs of each batch of a run's rows, with the student as it is."""
    prepared = prepare(config, Rows(config.data.all_sources), lambda _: None, keep_answers=False)
    (objective,) = prepared.objectives
    found = []
    with prepared.opened, torch.no_grad():
        for first in range(0, 12, 4):
            batch = prepared.collator([prepared.features[nth] for nth in range(first, first + 4)])
            signal = objective.teacher.signal(batch, objective.method.signal_request)
            kd = objective.method(batch.student_logits_at(prepared.student), signal, batch).sums.kd[0]
            found.append([float(kd.kd), float(kd.matched_mass), float(kd.pairs)])
    return found


def test_a_second_epoch_asks_nothing_and_the_answers_are_a_cache(
    tiny, config, server, tmp_path: Path
) -> None:
    """24 rows of which all have groups: two epochs, then a run from the folder, then one that goes on with it."""
    twice = config(served(tiny, server), epochs=2, max_steps=None)
    found = losses(twice)
    rows = asked(server)
    assert len(rows) == len(set(rows)) == 24
    folder = tmp_path / "out" / "answers-of-teacher-0"
    cache = TeacherCache.open(folder)
    cache.verify()
    assert (cache.header.rows, cache.k, cache.header.teacher_dtype) == (24, 40, "served")
    assert not list(folder.glob("part-*"))
    cached = {"teachers": [{"model": tiny.teacher, "top_k": 40, "cache": str(folder)}]}
    again = config(cached | {"output": str(tmp_path / "cached")}, epochs=2, max_steps=None)
    assert losses(again) == found, "numbers of the cache are those of the server"
    third = config(
        served(tiny, server, cache=str(folder)) | {"output": str(tmp_path / "third")},
        epochs=2,
        max_steps=None,
    )
    assert losses(third) == found
    assert asked(server) == rows, "only tokenizer and model are proved again"


def test_held_out_rows_are_asked_about_and_kept_apart(tiny, config, server, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(f'{{"prompt": "a cat {n}", "completion": "sits on the hill"}}\n' for n in range(4))
    )
    held = {"eval": {"path": str(other), "every": 2}}
    found = run(config(served(tiny, server) | held | {"output": str(tmp_path / "served")}))
    local = run(config(held | {"output": str(tmp_path / "local")}))
    for one, known in zip(found.evaluations, local.evaluations, strict=True):
        assert one.loss == pytest.approx(known.loss, rel=WITHIN)
    texts = asked(server)
    assert len(texts) == len(set(texts)) == 16 + 4, "nothing is asked twice, though there are two evaluations"


def test_what_a_server_does_not_allow(tiny, config, server) -> None:
    server.max_logprobs = 20
    with pytest.raises(
        BadOption, match=r"`top_k` is 40; give at most 20: .* unless it is started with --max-logprobs 40"
    ):
        run(config(served(tiny, server)))
    without = served(tiny, server)
    del without["teachers"][0]["top_k"]
    result = run(config(without))
    assert any(
        "gives 20 candidates; started with --max-logprobs 100 it would give 100" in note
        for note in result.warnings
    )
    assert no_threads()


def test_rows_that_are_longer_than_the_servers_context(tiny, config, server, tmp_path: Path) -> None:
    rows, server.max_model_len = tmp_path / "long.jsonl", 240
    rows.write_text(json.dumps({"prompt": "the cat " * 120, "completion": "sits on the mat. " * 10}))
    with pytest.raises(
        BadOption, match=r"`max_length` is \d+; give at most 239: .* reads no more tokens of teacher"
    ):
        run(config(served(tiny, server) | {"data": {"path": str(rows)}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "has no /v1/completions, or no model 'other'"),
        (
            {"url": "http://127.0.0.1:9"},
            r"cannot be reached \(connection refused\); start it, or check `url`",
        ),
        ({"tokenizer": "STUDENT"}, "has another tokenizer than .*; give the one of its model as `tokenizer`"),
    ],
)
def test_what_is_wrong_with_a_server_is_told_before_a_model_is_loaded(
    tiny, config, server, change: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cdm_toolkit.distill.prepare.load_model", lambda *_, **__: pytest.fail("a model is loaded")
    )
    change = {name: tiny.student if value == "STUDENT" else value for name, value in change.items()}
    with pytest.raises(ServerProblem, match=message):
        run(config(served(tiny, server, **change)))
    assert no_threads()


def test_a_key_comes_from_the_environment_and_is_written_nowhere(
    tiny, config, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.api_key = "s3cret-value"
    with pytest.raises(
        ServerProblem, match=r"asks for a key \(HTTP 401\); name the variable .* by `api_key_env`"
    ):
        run(config(served(tiny, server)))
    with pytest.raises(BadOption, match=r"`api_key_env` is 'TEACHER_KEY'; give the name of .* that is set"):
        run(config(served(tiny, server, api_key_env="TEACHER_KEY")))
    monkeypatch.setenv("TEACHER_KEY", "schlüssel")
    with pytest.raises(BadOption, match="to a key in ASCII") as caught:
        run(config(served(tiny, server, api_key_env="TEACHER_KEY")))
    assert "schl" not in str(caught.value)
    monkeypatch.setenv("TEACHER_KEY", "wrong")
    with pytest.raises(ServerProblem, match="check the key in TEACHER_KEY"):
        run(config(served(tiny, server, api_key_env="TEACHER_KEY")))
    monkeypatch.setenv("TEACHER_KEY", "s3cret-value\n")
    with caplog.at_level("DEBUG"):
        run(config(served(tiny, server, api_key_env="TEACHER_KEY")))
    assert "s3cret-value" not in caplog.text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"s3cret-value" not in path.read_bytes(), path


def test_failures_on_the_way_do_not_change_the_run(
    tiny, config, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_client, "FIRST_PAUSE", 0.05)
    local = losses(config({"output": str(tmp_path / "local")}))

    def fail() -> None:
        server.fail_next(3)
        server.fail_next(2, "cut")
        server.fail_next(2, "hang")

    server.delay = StopsAfter(server, 6, fail)
    one = config(served(tiny, server, timeout=1.0, in_flight=4) | {"output": str(tmp_path / "served")})
    np.testing.assert_allclose(losses(one), local, rtol=WITHIN)
    assert not server._faults
    assert no_threads()


def test_half_of_the_servers_are_dead(tiny, config, server, tmp_path: Path) -> None:
    two = config(served(tiny, server, url=["http://127.0.0.1:9", server.url]))
    result = run(two)
    local = losses(config({"output": str(tmp_path / "local")}))
    np.testing.assert_allclose([log.loss for log in result.losses], local, rtol=WITHIN)
    assert any("127.0.0.1:9 cannot be reached" in note for note in result.warnings)


def test_a_slow_server_is_asked_less(tiny, config, server) -> None:
    with ScoringServer(server.model, name="teacher", tokenizer=server.tokenizer, max_logprobs=200) as slow:
        slow.delay = 0.5
        one = served(tiny, server, url=[slow.url, server.url], in_flight=4)
        run(config(one, epochs=2, max_steps=None))
        assert len(server.scored) > 2 * len(slow.scored)


def test_servers_that_hang_or_fail_are_tried_by_one_request(tiny, config, server) -> None:
    with ScoringServer(server.model, name="teacher", tokenizer=server.tokenizer, max_logprobs=200) as dead:
        dead.delay = StopsAfter(dead, 1, lambda: setattr(dead, "hang", True))
        one = served(tiny, server, url=[server.url, dead.url], in_flight=4, timeout=0.5)
        run(config(one, epochs=3, max_steps=None))
        assert len(server.scored) > 24 > len(dead.scored)
    often = _Server("x")
    for _ in range(2000):
        often.left_out_until = 0.0
        often.failed()
    assert often.left_out_until < time.monotonic() + 31


def test_another_model_name_at_one_of_two_servers_is_told(tiny, config, server) -> None:
    other = ScoringServer(server.model, name="other", tokenizer=server.tokenizer, max_logprobs=200)
    with other, pytest.raises(ServerProblem, match="no model 'teacher'"):
        run(config(served(tiny, server, url=[server.url, other.url])))
    assert no_threads()


def test_a_run_that_is_resumed_keeps_its_teacher(tiny, config, server, tmp_path: Path) -> None:
    run(config(served(tiny, server), max_steps=2, save_every=2))
    with torch.no_grad():
        for weight in server.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(BadArtifact, match="of another teacher than is served now"):
        run(config(served(tiny, server), max_steps=4, save_every=2), resume=True)


def test_steps_of_several_batches_are_asked_ahead(tiny, config, server, tmp_path: Path) -> None:
    more = {"grad_accumulation": 3, "batch_size": 2, "max_steps": 4}
    local = losses(config({"output": str(tmp_path / "local")}, **more))
    server.delay = 0.05
    one = config(served(tiny, server, in_flight=6) | {"output": str(tmp_path / "served")}, **more)
    result = run(one)
    np.testing.assert_allclose([log.loss for log in result.losses], local, rtol=WITHIN)


def test_answers_about_other_ids_stop_the_run(tiny, config, server) -> None:
    server.wrong_ids = True
    one = config(served(tiny, server))
    with pytest.raises(ServerProblem, match="about other tokens than were sent"):
        run(one)


class StopsAfter:
    """Changes something when so many rows were asked for."""

    def __init__(self, server: ScoringServer, count: int, change: Any) -> None:
        self.server, self.count, self.change = server, count, change

    def __call__(self, _ids: Any) -> float:
        if len(self.server.scored) >= self.count and self.change is not None:
            change, self.change = self.change, None
            threading.Thread(target=change).start()
        return 0.0


def test_a_server_that_comes_back_with_another_model_is_found_out(
    tiny, config, server, tmp_path: Path
) -> None:
    def restart() -> None:
        server.stop()
        with torch.no_grad():
            for weight in server.model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        server.start()

    server.delay = StopsAfter(server, 14, restart)
    settings = served(tiny, server, in_flight=4)
    with pytest.raises(ServerProblem, match="serves another model than before") as caught:
        run(config(settings, max_steps=6, save_every=100))
    checkpoint = tmp_path / "out" / "checkpoint-"
    assert "go on with `resume`" in str(caught.value)
    assert str(checkpoint) in str(caught.value), "what is done is kept"
    assert no_threads()


def test_a_run_that_lost_its_server_goes_on_with_the_same_bits(
    tiny, config, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_client, "FIRST_PAUSE", 0.05)
    whole = losses(config(served(tiny, server) | {"output": str(tmp_path / "whole")}, max_steps=6))
    server.delay = StopsAfter(server, len(server.scored) + 14, server.stop)
    settings = served(tiny, server, in_flight=4, patience=0.5)
    with pytest.raises(ServerProblem, match=r"has not answered a request for [01] s"):
        run(config(settings, max_steps=6))
    server.delay = 0.0
    server.start()
    assert losses(config(settings, max_steps=6), resume=True) == whole


def test_a_run_that_waits_for_a_server_can_be_stopped(tiny, config, server, tmp_path: Path) -> None:
    """Requests are open at a server that never answers."""
    from cdm_toolkit.distill import run as module

    told = threading.Event()

    def hang() -> None:
        server.hang = True
        threading.Timer(0.5, told.set).start()

    server.delay = StopsAfter(server, 16, hang)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_told_to_stop", lambda: _Told(told))
        with pytest.raises(Interrupted, match=r"the run was stopped, step [1-4] of 6 is kept in"):
            run(config(served(tiny, server, in_flight=4), max_steps=6, batch_size=4))
    assert no_threads()


class _Told:
    def __init__(self, told: threading.Event) -> None:
        self.told = told

    def __enter__(self) -> Any:
        return self.told.is_set

    def __exit__(self, *_: object) -> None: ...


def test_answers_of_other_rows_are_not_taken(tiny, config, server, tmp_path: Path) -> None:
    folder = str(tmp_path / "answers")
    run(config(served(tiny, server, cache=folder)))
    another = served(tiny, server, cache=folder) | {"output": str(tmp_path / "b"), "data": {"limit": 10}}
    with pytest.raises(BadArtifact, match=r"it holds other answers: .*data"):
        run(config(another))
