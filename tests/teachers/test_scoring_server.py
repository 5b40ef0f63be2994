"""The test server answers as vLLM and SGLang define it, in order or not, and fails as it is told."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scoring_server import SCORING, Engine, ScoringServer

from cdm_toolkit.errors import SourceNotFound
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_tokenizer

REAL = json.loads((Path(__file__).parents[1] / "data/vllm_answers.json").read_text(encoding="utf-8"))[
    "answers"
]
VOCAB = 11


def logprobs(ids: Sequence[int]) -> np.ndarray:
    """Give each position a distribution of its own, that depends on the ids before it."""
    logits = np.sin(np.arange(VOCAB)[None] * (1.3 + np.cumsum(ids)[:, None]))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def ask(server: ScoringServer, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        text = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text, headers)
        response = connection.getresponse()
        content = response.read()
        return response.status, json.loads(content) if content else None
    finally:
        connection.close()


def score(server: ScoringServer, ids: Sequence[int], k: int = 3, **more: Any) -> tuple[int, Any]:
    if server.engine == "vllm":
        body = {"model": server.name, "prompt": ids, "max_tokens": 1, "prompt_logprobs": k}
    else:
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
        body |= {"logprob_start_len": 0, "top_logprobs_num": k}
    return ask(server, SCORING[server.engine], body | more)


def told_ids(answer: Any) -> list[int]:
    """Give the tokens that an answer says stand at each position but the first."""
    if "choices" in answer:
        return [int(next(iter(position))) for position in answer["choices"][0]["prompt_logprobs"][1:]]
    return [id_ for _, id_, _ in answer["meta_info"]["input_token_logprobs"][1:]]


IDS = [3, 7, 1, 9, 4]


def test_vllm_gives_the_token_that_stands_there_and_the_k_likeliest() -> None:
    with ScoringServer(logprobs, vocab=VOCAB) as server:
        status, answer = score(server, IDS)
    first, *others = answer["choices"][0]["prompt_logprobs"]
    known = logprobs(IDS)
    assert status == 200
    assert first is None
    assert len(others) == len(IDS) - 1
    for at, position in enumerate(others):
        token, best = IDS[at + 1], np.argsort(-known[at])[:3]
        assert list(position) == list(dict.fromkeys(map(str, [token, *best])))
        for id_, entry in position.items():
            assert entry["logprob"] == float(known[at, int(id_)])
            assert entry["rank"] == (known[at] >= known[at, int(id_)]).sum()


@pytest.mark.parametrize("start", [0, 2, 4, 5])
@pytest.mark.parametrize("form", ["nested", "flat", "base64"])
def test_sglang_gives_positions_from_a_start_the_first_without_a_score(start: int, form: str) -> None:
    ids = [*IDS[:3], VOCAB - 1, IDS[4]]
    flat = {
        "return_flat_raw_top_logprobs": form != "nested",
        "return_flat_raw_top_logprobs_b64": form == "base64",
    }
    with ScoringServer(logprobs, engine="sglang") as server:
        status, answer = score(server, ids, logprob_start_len=start, **flat)
    meta, known = answer["meta_info"], logprobs(ids)
    assert status == 200
    tokens = [*ids[:3], 0, ids[4]]  # the last id of the vocabulary is given as 0
    assert [id_ for _, id_, _ in meta["input_token_logprobs"]] == tokens[start:]
    scores = [None, *(float(known[t - 1, ids[t]]) for t in range(start + 1, 5))]
    assert [score for score, _, _ in meta["input_token_logprobs"]] == scores[: 5 - start]
    best = np.argsort(-known[start:-1], axis=1)[:, :3]
    if form == "nested":
        top = meta["input_top_logprobs"]
        assert top[:1] == ([None] if start < 5 else [])
        assert [[id_ for _, id_, _ in position] for position in top[1:]] == best.tolist()
    elif form == "flat":
        assert meta["input_top_logprobs_shape"] == [len(best), 3]
        assert meta["input_top_logprobs_idx_flat"] == best.reshape(-1).tolist()
    else:
        told = np.frombuffer(base64.b64decode(meta["input_top_logprobs_idx_flat_b64"]), "<i4")
        assert told.tolist() == best.reshape(-1).tolist()


@pytest.fixture(scope="module")
def smollm2() -> Iterator[ScoringServer]:
    try:
        model = load_model("smollm2")
    except SourceNotFound as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer("smollm2").tokenizer
    with ScoringServer(model, vocab=model.config.vocab_size, max_logprobs=128, tokenizer=tokenizer) as server:
        yield server


@pytest.mark.parametrize("real", REAL, ids=lambda real: real["name"])
def test_answers_as_a_real_vllm(smollm2: ScoringServer, real: dict[str, Any]) -> None:
    body = real["body"]
    if body and isinstance(body.get("prompt"), dict):
        body = body | {"prompt": [body["prompt"]["id"]] * body["prompt"]["times"]}
    status, answer = ask(smollm2, real["path"], body)
    assert status == real["status"]
    if "choices" not in real["answer"]:
        known = ("created", "root", "permission")
        assert without(answer, *known) == without(real["answer"], *known)
        return
    choices = real["answer"]["choices"][: 1 if body.get("use_beam_search") else None]
    for here, there in zip(answer["choices"], choices, strict=True):
        assert here["finish_reason"] == there["finish_reason"]
        assert here["prompt_token_ids"] == there["prompt_token_ids"]
        positions = zip(here["prompt_logprobs"] or [], there["prompt_logprobs"] or [], strict=True)
        for mine, others in positions:
            assert (mine is None) == (others is None)
            assert list(mine or ()) == list(others or ())
            for id_, entry in (others or {}).items():
                assert without(mine[id_], "logprob", "rank") == without(entry, "logprob", "rank")
                assert mine[id_]["logprob"] == pytest.approx(entry["logprob"], abs=1e-4)
                assert mine[id_]["rank"] == pytest.approx(entry["rank"], rel=1e-3)


def without(value: Any, *names: str) -> Any:
    """Leave out names, on all levels."""
    if isinstance(value, dict):
        return {name: without(each, *names) for name, each in value.items() if name not in names}
    return [without(each, *names) for each in value] if isinstance(value, list) else value


def test_vllm_refuses() -> None:
    with ScoringServer(logprobs, vocab=VOCAB, max_logprobs=5, max_model_len=8, api_key="key") as server:
        key = {"Authorization": "Bearer key"}
        path, body = "/v1/completions", {"model": "smollm2", "prompt": IDS, "max_tokens": 1}
        assert ask(server, path, body) == (401, {"error": "Unauthorized"})
        for more, status, param in (
            ({"prompt_logprobs": 6}, 400, "prompt_logprobs"),
            ({"prompt_logprobs": -1}, 400, "prompt_logprobs"),
            ({"model": "other"}, 404, "model"),
            ({"prompt": [1, VOCAB]}, 400, None),
            ({"prompt": [1] * 9}, 400, "input_tokens"),
            ({"prompt": [1] * 8}, 400, "max_tokens"),
            ({"max_tokens": 0}, 400, "max_tokens"),
        ):
            got, answer = ask(server, path, body | more, **key)
            assert (got, answer["error"]["param"]) == (status, param)
        server.max_logprobs = -1
        status, answer = ask(server, path, body | {"prompt_logprobs": -1}, **key)
        assert len(answer["choices"][0]["prompt_logprobs"][1]) == VOCAB


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_fails_as_told(engine: Engine) -> None:
    with ScoringServer(logprobs, engine=engine, vocab=VOCAB) as server:
        server.fail_next(2, 503)
        assert [score(server, IDS)[0] for _ in range(3)] == [503, 503, 200]
        server.fail_next(1, "cut")
        with pytest.raises(IncompleteRead):
            score(server, IDS)
        server.hang = True
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(score, server, IDS)
            while server.in_flight == 0:
                assert not asked.done()
            server.stop()
            with pytest.raises((RemoteDisconnected, ConnectionError)):
                asked.result()
        with pytest.raises(ConnectionRefusedError):
            score(server, IDS)
        server.hang, server.wrong_ids = False, True
        server.start()
        assert told_ids(score(server, IDS)[1]) != told_ids(score(server, IDS[::-1])[1]) == IDS[1:]
        assert len(server.scored) == len(server.requests) == 7
        assert server.in_flight_max == 1


def test_holds_answers_and_turns_them_round() -> None:
    with ScoringServer(logprobs, vocab=VOCAB, hold=4) as server, ThreadPoolExecutor(4) as pool:
        waiting = []
        for nth in range(4):
            waiting.append(pool.submit(score, server, [nth, 1, 2]))
            while len(server.requests) <= nth:
                assert not waiting[0].done()
        assert [each.result()[0] for each in waiting] == [200] * 4
        assert server.in_flight_max == 4
        score(server, [9, 1])  # alone, and let out all the same
    asked, answered = (
        [request.body["prompt"][0] for request in each] for each in (server.requests, server.answered)
    )
    assert asked == [0, 1, 2, 3, 9]
    assert sorted(answered[:4]) == asked[:4] != answered[:4]
    assert answered[4] == 9
