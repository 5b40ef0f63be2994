"""What vLLM and SGLang are asked for prompt log-probabilities, and how their answers are read. No I/O.

vLLM: `POST /v1/completions` with the prompt as ids and `prompt_logprobs`; the answer has an entry for each token of
the prompt, None for the first: its k likeliest candidates, and the token itself where it is not among them. SGLang:
`POST /generate` with `input_ids`, `return_logprob` and `logprob_start_len`; tokens and candidates come as two lists
from that position on, the first entry null.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32
from pydantic_core import from_json

EngineName = Literal["vllm", "sglang"]
NOTHING = -9999.0
"""Log-probability of what a model rules out: JSON has no infinity, and vLLM writes this."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Log-probabilities of a sequence: position p is at its token `first + p`, and predicts the one after it.

    `ids` and `logprobs` are the candidates, most likely first, and `token_logprobs` those of the tokens that follow.
    """

    first: int
    ids: Int32[np.ndarray, "position topk"]
    logprobs: Float32[np.ndarray, "position topk"]
    token_logprobs: Float32[np.ndarray, " position"]


class BadAnswer(Exception):
    """An answer that is cut off or is not what was asked for."""


class Refusal(Exception):
    """A server will not answer such a request, however often it is asked. `cap` is the most candidates that it gives,
    where these were too many."""

    url = ""
    """Of the server."""

    def __init__(self, reason: str, *, cap: int | None = None) -> None:
        self.reason, self.cap = reason, cap
        super().__init__(reason)


@runtime_checkable
class Engine(Protocol):
    """How one kind of server is asked."""

    path: str
    start: str
    """How its server is given more candidates."""

    def request(
        self, model: str, ids: Sequence[int], first: int, k: int, *, texts: bool = False
    ) -> dict[str, Any]:
        """Write the request for the log-probabilities of what follows each token from `first` on.

        With `texts` the answer has the texts of ids besides.
        """

    def read(self, body: bytes, ids: Sequence[int], first: int, k: int) -> Scored:
        """Read the answer to it. BadAnswer."""

    def texts(self, body: bytes) -> Mapping[int, str]:
        """Give the texts that the server has for ids, where the answer tells."""

    def refusal(self, body: bytes) -> Refusal:
        """Read why a request was refused."""


class VLLM:
    """vLLM's completions, with its extension `prompt_logprobs`."""

    path = "/v1/completions"
    start = "--max-logprobs {k}"

    def request(
        self, model: str, ids: Sequence[int], first: int, k: int, *, texts: bool = False
    ) -> dict[str, Any]:
        # texts come in any case; one token is the fewest that a completion has; temperature does not reach the prompt
        return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}

    def read(self, body: bytes, ids: Sequence[int], first: int, k: int) -> Scored:
        entries = self._entries(body)
        if len(entries) != len(ids):
            raise BadAnswer(f"it has {len(entries)} positions for {len(ids)} tokens")
        candidates, own = list[dict[int, float]](), list[float]()
        with _reading():
            for token, entry in zip(ids[first + 1 :], entries[first + 1 :], strict=True):
                found = {int(name): value["logprob"] for name, value in entry.items()}
                if token not in found:
                    raise BadAnswer(f"it is about other tokens than were sent: {token} is not in it")
                own.append(found[token])
                if len(found) > k:
                    del found[token]
                candidates.append(found)
        return _scored(
            first, [list(each) for each in candidates], [list(each.values()) for each in candidates], own, k
        )

    def texts(self, body: bytes) -> Mapping[int, str]:
        entries = [entry for entry in self._entries(body) if entry]
        with _reading():
            texts = {
                int(name): value.get("decoded_token") for entry in entries for name, value in entry.items()
            }
        return {token: text for token, text in texts.items() if text is not None}

    def refusal(self, body: bytes) -> Refusal:
        reason = _reason(body)
        # "Requested prompt logprobs of 100, which is greater than max allowed: 20"
        cap = re.search(r"logprobs of \d+.*max allowed: (\d+)", reason)
        return Refusal(reason, cap=int(cap[1]) if cap else None)

    def _entries(self, body: bytes) -> list[Any]:
        with _reading():
            entries = from_json(body)["choices"][0]["prompt_logprobs"]
        if not isinstance(entries, list):
            raise BadAnswer("it has no prompt_logprobs")
        return entries


class SGLang:
    """SGLang's own interface."""

    path = "/generate"
    start = "another version"

    def request(
        self, model: str, ids: Sequence[int], first: int, k: int, *, texts: bool = False
    ) -> dict[str, Any]:
        return {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": first,
            "top_logprobs_num": k,
            "return_text_in_logprobs": texts,
        }

    def read(self, body: bytes, ids: Sequence[int], first: int, k: int) -> Scored:
        with _reading():
            found = from_json(body)["meta_info"]
            tokens, tops = list(found["input_token_logprobs"]), list(found["input_top_logprobs"])
        following = ids[first + 1 :]
        if min(len(tokens), len(tops)) < len(following):
            raise BadAnswer(f"it has {len(tokens)} tokens where {len(following)} follow")
        tokens, tops = tokens[len(tokens) - len(following) :], tops[len(tops) - len(following) :]
        with _reading():
            same = sum(token == there for token, (_, there, _) in zip(following, tokens, strict=True))
            for token, (_, there, _) in zip(following, tokens, strict=True):
                # the last id of a vocabulary is given as 0
                if there not in (token, 0) or 2 * same < len(following):
                    raise BadAnswer(f"it is about other tokens than were sent: {there} for {token}")
            own = [_or_nothing(logprob) for logprob, *_ in tokens]
            candidates = [[there for _, there, _ in top] for top in tops]
            logprobs = [[_or_nothing(logprob) for logprob, *_ in top] for top in tops]
        return _scored(first, candidates, logprobs, own, k)

    def texts(self, body: bytes) -> Mapping[int, str]:
        with _reading():
            found = from_json(body)["meta_info"]
            every = [
                *found["input_token_logprobs"],
                *(one for top in found["input_top_logprobs"] for one in top or ()),
            ]
            return {token: text for _, token, text in every if text is not None}

    def refusal(self, body: bytes) -> Refusal:
        return Refusal(_reason(body))


ENGINES: Mapping[EngineName, Engine] = {"vllm": VLLM(), "sglang": SGLang()}


def _or_nothing(logprob: float | None) -> float:
    """Read a log-probability of SGLang, whose JSON has null for minus infinity."""
    return NOTHING if logprob is None else logprob


@contextmanager
def _reading() -> Iterator[None]:
    """Turn what reading JSON of another shape raises into BadAnswer."""
    try:
        yield
    except ValueError:
        raise BadAnswer("it is cut off, or is no JSON") from None
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise BadAnswer(f"it is not what this engine answers ({type(error).__name__} {error})") from None


def _reason(body: bytes) -> str:
    """Find the message of an error, in the shapes that servers have for it."""
    try:
        found = from_json(body)
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and name in found:
                found = found[name]
    except ValueError:
        found = body.decode(errors="replace")
    return " ".join(str(found).split())[:300].rstrip(".") or "it gives no reason"


def _scored(
    first: int, ids: list[list[int]], logprobs: list[list[float]], own: list[float], k: int
) -> Scored:
    """Sort candidates, the most likely first. BadAnswer where there are not `k` each, or a number is none."""
    if fewer := [len(each) for each in ids if len(each) != k]:
        raise BadAnswer(f"it has {fewer[0]} candidates at a position, not {k}")
    try:
        every = np.array(logprobs, np.float32).reshape(len(ids), k)
        tokens = np.array(own, np.float32)
    except (TypeError, ValueError):
        raise BadAnswer("a log-probability in it is no number") from None
    if np.isnan(every).any() or np.isnan(tokens).any():
        raise BadAnswer("a log-probability in it is not finite")
    order = np.argsort(-every, axis=1, kind="stable")
    return Scored(
        first,
        np.take_along_axis(np.array(ids, np.int32).reshape(len(ids), k), order, axis=1),
        np.maximum(np.take_along_axis(every, order, axis=1), NOTHING),
        np.maximum(tokens, NOTHING),
    )


def within_vocabulary(scored: Scored, vocab: int) -> Scored:
    """Put other ids, ruled out, in place of candidates that no token has: rows that pad a model's embedding."""
    beyond = scored.ids >= vocab
    if not beyond.any():
        return scored
    ids, logprobs = scored.ids.copy(), np.where(beyond, np.float32(NOTHING), scored.logprobs)
    for row in np.flatnonzero(beyond.any(1)):
        free = np.setdiff1d(np.arange(ids.shape[1] + beyond[row].sum()), ids[row])
        ids[row, beyond[row]] = free[: beyond[row].sum()]
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return Scored(
        scored.first,
        np.take_along_axis(ids, order, axis=1),
        np.take_along_axis(logprobs, order, axis=1),
        scored.token_logprobs,
    )
