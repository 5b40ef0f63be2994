"""A vLLM server that samples for a run: the same samples as `generate`, and what goes wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scoring_server import Refused, ScoringServer

from cdm_toolkit.distill import vllm_server
from cdm_toolkit.distill.plan import plan
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.run import RunResult, run
from cdm_toolkit.distill.settings import DistillConfig, OnPolicyConfig
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.errors import BadOption, BadSettings, NotFinite, ServerProblem
from cdm_toolkit.hub.models import load_model, save_model
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.teachers.served import Stopped

SHORT = {"share": 1.0, "max_new_tokens": 8}
GREEDY = {**SHORT, "temperature": 0}


@pytest.fixture
def server(tiny) -> Iterator[ScoringServer]:
    tokenizer = load_tokenizer(tiny.student).tokenizer
    with ScoringServer(load_model(tiny.student), name="student", tokenizer=tokenizer, dev_mode=True) as made:
        yield made


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "FIRST_PAUSE", 0.05)


def by(server: ScoringServer, **more: Any) -> dict[str, Any]:
    return {"engine": "vllm", "url": server.url, "patience": 0.5, **more}


def samples_in(result: RunResult) -> list[dict[str, Any]]:
    lines = (result.output / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def same_weights(one: RunResult, two: RunResult) -> bool:
    first, second = (load_file(each.output / "model.safetensors") for each in (one, two))
    return all(torch.equal(weights, second[name]) for name, weights in first.items())


@pytest.mark.parametrize("buffer_steps", [1, 2])
def test_a_run_is_that_of_generate_where_nothing_is_drawn_by_lot(
    config, server: ScoringServer, tmp_path: Path, buffer_steps: int
) -> None:
    """Greedy samples of every step are those of the student as it then is."""
    greedy = {**GREEDY, "share": 0.7, "buffer_steps": buffer_steps}
    own = run(config({"on_policy": greedy, "output": str(tmp_path / "own")}))
    served = run(config({"on_policy": greedy | by(server)}))
    assert samples_in(served) == samples_in(own)
    assert [log.loss for log in served.losses] == [log.loss for log in own.losses]
    assert same_weights(served, own)
    steps = [Path(folder).name for folder in server.reloaded]
    assert steps == [f"step-{step}" for step in range(0, 4, buffer_steps)]
    assert not list(served.output.glob("weights-for-vllm*"))


def test_samples_are_drawn_by_seeds(config, server: ScoringServer) -> None:
    """Samples of one prompt differ, a run again has the same, and a server's own settings have no part in them."""
    settings = {"on_policy": {**SHORT, "samples_per_prompt": 4} | by(server)}
    once = run(config(settings, batch_size=8))
    of_prompt = [line["completion"] for line in samples_in(once) if line["step"] == 1][:4]
    assert len(set(of_prompt)) > 1
    bodies = [request.body for request in server.scored]
    assert len({body["seed"] for body in bodies}) == len(bodies)
    assert len({body["cache_salt"] for body in bodies}) == 4, "no keys and values of other weights"
    neutral = {
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }
    assert all(body.items() >= neutral.items() for body in bodies)
    assert samples_in(run(config(settings, batch_size=8), overwrite=True)) == samples_in(once)


def test_weights_lie_in_a_folder_of_the_runs_own(config, server: ScoringServer, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "step-1").mkdir(parents=True)
    (mine / "step-1" / "precious").write_text("")
    chosen = config({"on_policy": GREEDY | by(server, weights=str(mine))})
    planned = plan(chosen)
    assert planned.sampling is not None
    assert not server.reloaded
    run(chosen)
    assert {Path(each).parents[1] for each in server.reloaded} == {mine}
    assert [path.relative_to(mine) for path in mine.rglob("*") if path.is_file()] == [Path("step-1/precious")]


def test_a_server_that_was_started_again_is_given_the_weights(
    config, server: ScoringServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run(config({"on_policy": GREEDY, "output": str(tmp_path / "own")}))
    first = {name: weights.clone() for name, weights in server.model.state_dict().items()}
    real, died = server._sampled, list[bool]()

    def dies(*args: Any) -> Any:
        if len(server.generated) >= 10 and len(died) < 5:
            died.append(True)
            server.model.load_state_dict(first)
            raise Refused(500, {"error": {"message": "starting"}})
        return real(*args)

    monkeypatch.setattr(server, "_sampled", dies)
    found = run(config({"on_policy": GREEDY | by(server, patience=20)}))
    assert samples_in(found) == samples_in(own)
    assert len(server.reloaded) > 4


def test_what_takes_too_long_or_is_broken_off_is_asked_again(
    config, server: ScoringServer, tmp_path: Path
) -> None:
    own = run(config({"on_policy": GREEDY, "output": str(tmp_path / "own")}))
    slow = iter([3.0])
    server.delay, server.ends_by = lambda _: next(slow, 0.0), "abort"
    found = run(config({"on_policy": GREEDY | by(server, timeout=1, patience=0.1)}))
    assert samples_in(found) == samples_in(own)


def test_a_run_that_loses_it_goes_on(config, server: ScoringServer, tmp_path: Path) -> None:
    whole = run(config({"on_policy": GREEDY, "output": str(tmp_path / "own")}))
    chosen = config({"on_policy": GREEDY | by(server)}, save_every=100)
    real, began = server._sampled, len(server.generated)

    def ends(*args: Any) -> Any:
        if len(server.generated) - began >= 8:  # the samples of two steps are there
            server.fail_next(1000)
        return real(*args)

    server._sampled = ends  # type: ignore[method-assign]
    with pytest.raises(
        ServerProblem, match=r"has not sampled for 0 s .*then go on with `resume`.*checkpoint-2"
    ):
        run(chosen)
    server._faults.clear()
    server._sampled = real  # type: ignore[method-assign]
    again = run(chosen, resume=True)
    assert samples_in(again) == samples_in(whole)
    assert same_weights(again, whole)


def test_a_run_that_is_told_to_end_does_not_wait(config, server: ScoringServer) -> None:
    for hangs in ("sample", "reload"):
        chosen: DistillConfig = config({"on_policy": GREEDY | by(server, patience=60)})
        prepared = prepare(chosen, Rows(chosen.sources), lambda _: None, keep_answers=False)
        on_policy = prepared.on_policy
        assert on_policy is not None
        assert on_policy.server is not None
        if hangs == "sample":
            server.delay = 5.0
        else:
            server._reload = lambda _: time.sleep(5)  # type: ignore[method-assign]
        began = time.monotonic()
        on_policy.server.stopping = lambda began=began: time.monotonic() - began > 1
        numbers = [sorted(on_policy.prompts)[:4]]
        work = {
            "reload": partial(on_policy.server.update_weights, prepared.student, 0),
            "sample": partial(on_policy.draw, prepared.student, numbers, 0, 0, 1),
        }
        with prepared.opened, pytest.raises(Stopped):
            work[hangs]()
        assert time.monotonic() - began < 4


def test_two_runs_do_not_share_a_server(config, server: ScoringServer, tmp_path: Path) -> None:
    chosen = config({"on_policy": SHORT | by(server)})
    prepared = prepare(chosen, Rows(chosen.sources), lambda _: None)
    with prepared.opened:
        assert plan(chosen).sampling is not None
        with pytest.raises(ServerProblem, match="samples for another run; wait for the end of that one"):
            run(config({"on_policy": SHORT | by(server), "output": str(tmp_path / "other")}))
    run(chosen)


def says(server: ScoringServer, status: int, reason: str) -> Any:
    """Let the server answer a request for weights so."""

    def refuses(_: str) -> None:
        raise Refused(status, {"error": {"message": reason}})

    return refuses


def test_what_is_wrong_with_a_server_is_one_line(config, server: ScoringServer, monkeypatch) -> None:
    chosen = config({"on_policy": SHORT | by(server)})

    def told(said: str, chosen: DistillConfig = chosen) -> None:
        with pytest.raises(ServerProblem, match=said) as caught:
            run(chosen, overwrite=True)
        assert "\n" not in str(caught.value)
        assert not list(Path(chosen.output).glob("weights*"))

    server.max_model_len = 12
    told("takes 12 tokens, and prompts with their samples have up to")
    server.max_model_len, server.dev_mode = 2048, False
    told("does not take the student's weights .*start it with VLLM_SERVER_DEV_MODE=1 vllm serve /")
    server.dev_mode, server.api_key = True, "secret"
    told("asks for a key .*give `on_policy.api_key_env`")
    monkeypatch.setenv("KEY", "wrong")
    with_key = config({"on_policy": SHORT | by(server, api_key_env="KEY")})
    told("asks for a key .*check the key in KEY", with_key)
    monkeypatch.setenv("KEY", "secret")
    run(with_key, overwrite=True)
    server.api_key = None
    server.stop()
    told("cannot be reached .*start it with VLLM_SERVER_DEV_MODE=1")
    server.start()
    with monkeypatch.context() as patch:
        patch.setattr(server, "_reload", says(server, 500, "no such folder"))
        told("cannot read the student's weights in /.*no such folder.*see that it has this folder")
        patch.setattr(server, "_reload", says(server, 503, "starting"))
        told("has not sampled for 0 s .*503: starting")
    real = server._sampled
    with monkeypatch.context() as patch:
        patch.setattr(server, "_sampled", lambda prompt, body: real(prompt, body | {"max_tokens": 3}))
        told("cuts samples at 3 tokens, not at 8")
    server.keeps_weights = True
    with torch.no_grad():
        server.model.get_output_embeddings().weight.mul_(-3)
    told("samples from another model than the student .* nats a token apart")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_weights_that_cannot_be_written(
    config, server: ScoringServer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The run ends with what it has."""
    from transformers import PreTrainedModel

    save, done = PreTrainedModel.save_pretrained, list[Path]()

    def full(model: Any, folder: Any, *args: Any, **more: Any) -> None:
        if Path(folder).name == "step-2":
            raise error
        done.append(Path(folder))
        save(model, folder, *args, **more)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    chosen = config({"on_policy": GREEDY | by(server)}, save_every=100)
    with pytest.raises(ServerProblem, match=r"step-2 cannot be written \(No space left.*checkpoint-2"):
        run(chosen)


def test_a_student_whose_logits_are_not_finite_is_told(config, server: ScoringServer, tiny, tmp_path) -> None:
    model = load_model(tiny.student)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    save_model(model, load_tokenizer(tiny.student), tmp_path / "broken")
    with pytest.raises(NotFinite, match="what the student samples from"):
        run(config({"student": str(tmp_path / "broken"), "on_policy": SHORT | by(server)}))


def test_settings_that_do_not_go_together(config, server: ScoringServer, monkeypatch) -> None:
    with pytest.raises(BadSettings, match=r"on_policy\.url is missing: engine vllm needs"):
        config({"on_policy": {"engine": "vllm"}})
    with pytest.raises(BadSettings, match=r"on_policy\.url is of engine vllm: set `engine: vllm`"):
        config({"on_policy": {"url": server.url}})
    with pytest.raises(BadOption, match="transformers where adapters are trained"):
        run(config({"on_policy": SHORT | by(server), "train": {"lora": {}}}))
    assert OnPolicyConfig(engine="vllm", url="http://a:1/").url == "http://a:1"
    chosen = config({"on_policy": SHORT | by(server)})
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(BadOption, match="one server that all machines of the run reach"):
        prepare(chosen, Rows(chosen.sources), lambda _: None)
