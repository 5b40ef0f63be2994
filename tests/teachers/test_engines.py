"""What servers are asked, and how their answers are read, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cdm_toolkit.teachers.engines import ENGINES, NOTHING, BadAnswer, Scored, within_vocabulary

IDS = [7, 3, 5, 9]
BEST = {1: [(5, -0.5), (3, -1.0)], 2: [(8, -0.25), (4, -2.5)], 3: [(9, -0.125), (1, -4.0)]}
"""By position: the two likeliest ids there; what stands there is 3, 5, 9, of which 5 is not among them."""
OWN = {1: -1.0, 2: -6.5, 3: -0.125}


def vllm(best: dict[int, list[tuple[int, float]]] = BEST, own: dict[int, float] = OWN) -> bytes:
    entries: list[Any] = [None]
    for at in (1, 2, 3):
        listed = {IDS[at]: own[at]} | dict(best[at])
        entries.append(
            {
                str(id_): {"logprob": value, "rank": 1, "decoded_token": f"<{id_}>"}
                for id_, value in listed.items()
            }
        )
    return json.dumps({"choices": [{"prompt_logprobs": entries}]}).encode()


def sglang(best: dict[int, list[tuple[int, float]]] = BEST, own: dict[int, float] = OWN) -> bytes:
    tokens = [[None, 7, None], *([own[at], IDS[at], f"<{IDS[at]}>"] for at in (1, 2, 3))]
    tops = [None, *([[value, id_, None] for id_, value in best[at]] for at in (1, 2, 3))]
    return json.dumps({"meta_info": {"input_token_logprobs": tokens, "input_top_logprobs": tops}}).encode()


Written = Callable[..., bytes]
BOTH = pytest.mark.parametrize(("name", "written"), [("vllm", vllm), ("sglang", sglang)])


@BOTH
@pytest.mark.parametrize("first", [0, 1, 2])
def test_positions_from_the_first_on_are_read(name: Any, written: Written, first: int) -> None:
    found = ENGINES[name].read(written(), IDS, first, 2)
    assert found.first == first
    assert found.ids.tolist() == [[id_ for id_, _ in BEST[at]] for at in range(first + 1, 4)]
    assert found.logprobs.tolist() == [[value for _, value in BEST[at]] for at in range(first + 1, 4)]
    assert found.token_logprobs.tolist() == [OWN[at] for at in range(first + 1, 4)]


@BOTH
def test_candidates_are_sorted_and_what_is_ruled_out_is_a_number(name: Any, written: Written) -> None:
    nothing = NOTHING if name == "vllm" else None
    best = BEST | {2: [(4, nothing), (8, -0.25)]}
    found = ENGINES[name].read(written(best), IDS, 1, 2)  # type: ignore[arg-type]
    assert found.ids[0].tolist() == [8, 4]
    assert found.logprobs[0].tolist() == [-0.25, NOTHING]


@BOTH
def test_answers_that_are_not_what_was_asked_for(name: Any, written: Written) -> None:
    engine, body = ENGINES[name], written()
    for cut in (b"", body[:-30], b"[]", b'{"choices": []}', b'{"meta_info": {}}', b"<html>"):
        with pytest.raises(BadAnswer, match=r"cut off|not what this engine answers"):
            engine.read(cut, IDS, 0, 2)
    with pytest.raises(BadAnswer, match="other tokens than were sent"):
        engine.read(body, [7, 3, 6, 9], 0, 2)
    with pytest.raises(BadAnswer, match="2 candidates at a position, not 3"):
        engine.read(body, IDS, 0, 3)
    with pytest.raises(BadAnswer, match=r"positions|tokens|not what"):
        engine.read(body, [1, *IDS], 0, 2)
    with pytest.raises(BadAnswer, match=r"not finite|no number"):
        engine.read(written(own=OWN | {2: float("nan")}), IDS, 0, 2)


def test_refusals_are_read() -> None:
    engine = ENGINES["vllm"]
    too_many = "Requested prompt logprobs of 100, which is greater than max allowed: 20"
    found = engine.refusal(json.dumps({"error": {"message": too_many, "code": 400}}).encode())
    assert (found.cap, found.reason) == (20, too_many)
    assert engine.refusal(b'{"error": "Unauthorized"}').reason == "Unauthorized"
    assert engine.refusal(b"<html>Bad\n gateway</html>").reason == "<html>Bad gateway</html>"
    assert engine.refusal(b"").reason == "it gives no reason"


def test_rows_that_pad_an_embedding_are_no_candidates() -> None:
    ids = np.array([[12, 3, 1], [2, 0, 11]], np.int32)
    logprobs = np.array([[-0.1, -2.0, -3.0], [-0.5, -1.0, -2.0]], np.float32)
    found = within_vocabulary(Scored(4, ids, logprobs, logprobs[:, 0]), 10)
    assert found.ids.tolist() == [[3, 1, 0], [2, 0, 1]]
    assert found.logprobs.tolist() == [[-2.0, -3.0, NOTHING], [-0.5, -1.0, NOTHING]]
    whole = Scored(4, ids, logprobs, logprobs[:, 0])
    assert within_vocabulary(whole, 13) is whole
