"""A vLLM server that samples for a run: the same samples as `generate`, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scoring_server import ScoringServer

from cdm_toolkit.distill import vllm_server
from cdm_toolkit.distill.run import RunResult, run
from cdm_toolkit.distill.settings import OnPolicyConfig
from cdm_toolkit.errors import BadOption, BadSettings, FileProblem, ServerProblem
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_tokenizer

SHORT = {"share": 1.0, "max_new_tokens": 8}


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


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "model.safetensors")


@pytest.mark.parametrize("buffer_steps", [1, 2])
def test_a_run_is_that_of_generate_where_nothing_is_drawn_by_lot(
    config, server: ScoringServer, tmp_path: Path, buffer_steps: int
) -> None:
    """Greedy samples of every step are those of the student as it then is."""
    greedy = {**SHORT, "share": 0.7, "temperature": 0, "buffer_steps": buffer_steps}
    own = run(config({"on_policy": greedy, "output": str(tmp_path / "own")}))
    served = run(config({"on_policy": greedy | by(server)}))
    assert samples_in(served) == samples_in(own)
    assert [log.loss for log in served.losses] == [log.loss for log in own.losses]
    assert all(torch.equal(one, weights(own)[name]) for name, one in weights(served).items())
    steps = [Path(folder).name for folder in server.reloaded]
    assert steps == [f"step-{step}" for step in range(0, 4, buffer_steps)]
    assert not (served.output / "weights-for-vllm").exists()


def test_samples_are_drawn_by_seeds(config, server: ScoringServer, tmp_path: Path) -> None:
    """Samples of one prompt differ, a run again has the same, and weights may lie elsewhere."""
    folder = tmp_path / "shared"
    settings = {"on_policy": {**SHORT, "samples_per_prompt": 4} | by(server, weights=str(folder))}
    once = run(config(settings, batch_size=8))
    of_prompt = [line["completion"] for line in samples_in(once) if line["step"] == 1][:4]
    assert len(set(of_prompt)) > 1
    assert {Path(each).parent for each in server.reloaded} == {folder}
    assert samples_in(run(config(settings, batch_size=8), overwrite=True)) == samples_in(once)
    bodies = [request.body for request in server.scored]
    assert len({body["seed"] for body in bodies}) == len(bodies) // 2
    assert all((body["top_k"], body["repetition_penalty"]) == (-1, 1.0) for body in bodies)


def test_a_server_that_comes_back_is_given_the_weights_again(config, server: ScoringServer, tmp_path) -> None:
    greedy = {**SHORT, "temperature": 0}
    own = run(config({"on_policy": greedy, "output": str(tmp_path / "own")}))
    server.fail_next(3)
    assert samples_in(run(config({"on_policy": greedy | by(server, patience=20)}))) == samples_in(own)
    assert len(server.reloaded) > 4


def test_a_run_that_loses_it_goes_on(config, server: ScoringServer, tmp_path: Path) -> None:
    greedy = {**SHORT, "temperature": 0}
    whole = run(config({"on_policy": greedy, "output": str(tmp_path / "own")}))
    chosen = config({"on_policy": greedy | by(server)}, save_every=100)
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
    assert all(torch.equal(one, weights(whole)[name]) for name, one in weights(again).items())


def test_what_is_wrong_with_a_server_is_one_line(config, server: ScoringServer, monkeypatch) -> None:
    settings = {"on_policy": SHORT | by(server)}
    server.max_model_len = 12
    with pytest.raises(ServerProblem, match="takes 12 tokens, and prompts with their samples have up to"):
        run(config(settings))
    server.max_model_len, server.dev_mode = 2048, False
    with pytest.raises(
        ServerProblem, match=r"does not take the student's weights .*start it with VLLM_SERVER_DEV_MODE=1"
    ):
        run(config(settings), overwrite=True)
    server.dev_mode, server.api_key = True, "secret"
    with pytest.raises(ServerProblem, match=r"asks for a key .*api_key_env"):
        run(config(settings), overwrite=True)
    monkeypatch.setenv("KEY", "secret")
    run(config({"on_policy": SHORT | by(server, api_key_env="KEY")}), overwrite=True)
    server.api_key = None
    server.stop()
    with pytest.raises(ServerProblem, match=r"cannot be reached .*start it \(VLLM_SERVER_DEV_MODE=1"):
        run(config(settings), overwrite=True)
    server.start()
    server.keeps_weights = True
    with torch.no_grad():
        server.model.get_output_embeddings().weight.mul_(-3)
    with pytest.raises(ServerProblem, match=r"samples from another model than the student \(.* nats a token"):
        run(config(settings), overwrite=True)


def test_weights_that_cannot_be_written(config, server: ScoringServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem, match="the student's weights cannot be written there"):
        run(config({"on_policy": SHORT | by(server, weights=str(tmp_path / "file"))}))


def test_settings_that_do_not_go_together(config, server: ScoringServer) -> None:
    with pytest.raises(BadSettings, match=r"on_policy\.url is missing: engine vllm needs"):
        config({"on_policy": {"engine": "vllm"}})
    with pytest.raises(BadSettings, match=r"on_policy\.url is of engine vllm: set `engine: vllm`"):
        config({"on_policy": {"url": server.url}})
    with pytest.raises(BadOption, match="transformers where adapters are trained"):
        run(config({"on_policy": SHORT | by(server), "train": {"lora": {}}}))
    assert OnPolicyConfig(engine="vllm", url="http://a:1/").url == "http://a:1"
