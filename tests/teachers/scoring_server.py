"""A server on the loopback that scores prompts with a local model, and speaks the JSON of vLLM or of SGLang.

    python tests/teachers/scoring_server.py --model smollm2 --engine vllm --port 0

What the engines define, read in the sources of vLLM 0.32.0 and SGLang 0.5.23; ../data/vllm_answers.json has answers
of a real vLLM. t is a position of the prompt, from 0.

vLLM, POST /v1/completions
  prompt            ids, texts, or lists of these: one choice for each. `model` may be left out.
  max_tokens        at least 1, but for 0 with `echo`, where it generates one and does not show it.
  prompt_logprobs   k. choices[i].prompt_logprobs[0] is null. At t ≥ 1 {"id": {logprob, rank, decoded_token}}: first the
                    token that stands at t, wherever it ranks, then the k likeliest, in order; k entries where it is one
                    of them, else k + 1. 0 gives the token alone, −1 the vocabulary. All positions, always: no range of
                    them can be asked for (SamplingParams has prompt_logprob_start, for given ids only and not here).
  numbers           float32 log softmax of the model's logits, as the double that equals it. Temperature, top_p and
                    penalties do not touch them. −inf is −9999.0. NaN is no JSON: HTTP 400.
  ids               of all columns of the model, so also those past the end of the tokenizer's vocabulary.
  errors            {"error": {"message", "type", "param", "code"}}. 400 BadRequestError for k above --max-logprobs (20,
                    −1 no cap), an id outside the vocabulary, a prompt longer than the context, what is not of the form,
                    `stream` with prompt_logprobs; a prompt as long as the context is told that max_tokens is 0. 404
                    NotFoundError for another model; 401 {"error": "Unauthorized"} for paths under /v1 without the key.
  use_beam_search   gives no prompt log-probabilities (null).
  sampling          temperature (0: the likeliest), top_p, seed, stop_token_ids, max_tokens. With return_token_ids
                    choices[i].token_ids are those that were sampled, the one that ends it among them; with logprobs 0
                    logprobs.token_logprobs are theirs, before temperature.
  weights           with VLLM_SERVER_DEV_MODE=1: POST /collective_rpc {"method": "reload_weights", "kwargs":
                    {"weights_path": folder}} → {"results": [null]}, POST /reset_prefix_cache; else HTTP 404.
  others            GET /v1/models (id, root, max_model_len), /version, /health (empty); POST /tokenize ({prompt,
                    add_special_tokens} → {tokens, count, max_model_len, token_strs}), /detokenize ({tokens} →
                    {prompt}). A connection is closed after 5 idle seconds (so SGLang's).

SGLang, POST /generate
  input_ids         one prompt, or a list of them: one answer, or a list. There is no `model` in it.
  sampling_params   max_new_tokens may be 0: prefill alone.
  return_logprob    and logprob_start_len = s ≥ 0 (−1, the default: the output's alone). meta_info.input_token_logprobs
                    has an entry [logprob, id, text] for each t ≥ s. The first has null for a logprob, whatever s is:
                    for the token at t, ask for s ≤ t − 1. The last id of the vocabulary is given as 0 there.
  top_logprobs_num  k, without a cap. meta_info.input_top_logprobs is as long, its first entry null, each other a list
                    of k [logprob, id, text], likeliest first. The token that stands there is not added.
  token_ids_logprob ids to score besides, at each position, in meta_info.input_token_ids_logprobs.
  return_flat_raw_top_logprobs  gives input_top_logprobs_val_flat and _idx_flat [row × k], _shape and _null_prefix in
                    place of input_top_logprobs; with return_flat_raw_top_logprobs_b64 these are base64 of little-endian
                    float32 and int32, under _val_flat_b64 and _idx_flat_b64.
  text              null unless return_text_in_logprobs.
  numbers           as in vLLM; −inf and NaN are null.
  errors            {"error": {"message"}}, 400; {"error": "…"} for what is not of the form; 401 {"error":
                    "Unauthorized"} for every path but /health. Ids outside the vocabulary are not looked for: they
                    break the engine.
  others            GET /model_info (model_path, served_model_name, tokenizer_path; /get_model_info before it),
                    /v1/models (max_model_len), /server_info (version), /health.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Event, Lock, Thread
from typing import Any, Literal

import numpy as np
import torch

Engine = Literal["vllm", "sglang"]
Fault = int | Literal["cut", "hang"]
"""An HTTP status; or an answer that stops in its middle, or never comes."""

SCORING = {"vllm": "/v1/completions", "sglang": "/generate"}
VERSION = {"vllm": "0.32.0", "sglang": "0.5.23"}


@dataclass(frozen=True, slots=True)
class Request:
    """What came in."""

    path: str
    body: Any
    headers: dict[str, str]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status, body)
        self.status, self.body = status, body


@dataclass(eq=False)
class ScoringServer:
    """A server; what is set here holds from the next request on, while it runs too.

    `model` is a causal model of transformers, or a function of ids that gives log-probabilities [time, vocab].
    """

    model: Any
    engine: Engine = "vllm"
    name: str = "smollm2"
    tokenizer: Any = None
    """Tokenizer of transformers, for texts."""
    vocab: int | None = None
    """Columns of the model; a function's are not checked without it."""
    max_model_len: int = 2048
    max_logprobs: int = 20
    api_key: str | None = None
    port: int = 0
    """0 takes a free one, and keeps it through `stop` and `start`."""

    delay: float | Callable[[Sequence[int]], float] = 0.0
    """Seconds, or those for some ids, that an answer takes besides; requests do not wait for one another in it."""
    hold: int = 1
    """Answers held until so many wait, or none has come for `patience` seconds."""
    order: Literal["reverse", "shuffled"] = "reverse"
    """Order in which held answers go out."""
    patience: float = 0.3
    wrong_ids: bool = False
    """Answer for other ids than those asked for."""
    cut_answers: bool = False
    hang: bool = False

    dev_mode: bool = False
    """Take weights while it runs."""
    keeps_weights: bool = False
    """Say that they were taken, and keep those that were there."""
    generated: list[list[int]] = field(default_factory=list, init=False)
    reloaded: list[str] = field(default_factory=list, init=False)
    """Folders of weights that were read."""
    ends_by: str | None = None
    """Say that the next sample ended by this."""

    requests: list[Request] = field(default_factory=list, init=False)
    answered: list[Request] = field(default_factory=list, init=False)
    """Requests that were answered in full, in that order."""
    in_flight: int = field(default=0, init=False)
    in_flight_max: int = field(default=0, init=False)
    """Most scoring requests at once."""

    def __post_init__(self) -> None:
        self._lock, self._model_lock, self._turn = Lock(), Lock(), Condition()
        self._faults: list[Fault] = []
        self._held: list[object] = []
        self._released: list[object] = []
        self._arrived = 0.0
        self.stopped = Event()
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def scored(self) -> list[Request]:
        """Requests for scores."""
        return [request for request in self.requests if request.path == SCORING[self.engine]]

    def __enter__(self) -> ScoringServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.stopped.clear()
        self._server = _Server(self)
        self.port = self._server.server_address[1]
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop as a killed process does: connections that are open break."""
        self.stopped.set()
        if self._server is not None:
            self._server.end()

    def fail_next(self, count: int, fault: Fault = 500) -> None:
        """Let the next requests for scores fail."""
        with self._lock:
            self._faults += [fault] * count

    # What the handlers call

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self.in_flight += 1
            self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until it is this answer's turn to go out."""
        me = object()
        with self._turn:
            self._held.append(me)
            self._arrived = time.monotonic()
            while me not in self._released[:1]:
                late = time.monotonic() - self._arrived > self.patience
                if me in self._held and (len(self._held) >= self.hold or late or self.stopped.is_set()):
                    self._held.reverse() if self.order == "reverse" else random.Random(0).shuffle(self._held)
                    self._released += self._held
                    self._held = []
                    self._turn.notify_all()
                else:
                    self._turn.wait(self.patience / 4)
        try:
            yield
        finally:
            with self._turn:
                self._released.remove(me)
                self._turn.notify_all()

    def fault(self) -> Fault | None:
        with self._lock:
            if self._faults:
                return self._faults.pop(0)
        return "hang" if self.hang else "cut" if self.cut_answers else None

    def get(self, path: str) -> Any:
        card = {"id": self.name, "object": "model", "created": 0, "root": self.name, "parent": None}
        card |= {"owned_by": self.engine, "max_model_len": self.max_model_len}
        pages: dict[str, Any] = {"/health": None, "/v1/models": {"object": "list", "data": [card]}}
        if self.engine == "vllm":
            pages["/version"] = {"version": VERSION["vllm"]}
        else:
            info = {
                "model_path": self.name,
                "served_model_name": self.name,
                "tokenizer_path": self.name,
                "is_generation": True,
            }
            pages |= {"/model_info": info, "/get_model_info": info}
            pages["/server_info"] = {"version": VERSION["sglang"], "max_total_num_tokens": 1 << 16}
        if path == SCORING[self.engine]:
            raise Refused(405, {"detail": "Method Not Allowed"})
        if path not in pages:
            raise Refused(404, {"detail": "Not Found"})
        return pages[path]

    def post(self, path: str, body: Any) -> Any:
        if path == SCORING[self.engine]:
            wait = self.delay
            answer = self._completions(body) if self.engine == "vllm" else self._generate(body)
            self.stopped.wait(
                wait if isinstance(wait, int | float) else wait(_prompts(body, self.tokenizer)[0])
            )
            return answer
        if path == "/tokenize":
            tokens = self.tokenizer.encode(
                body["prompt"], add_special_tokens=body.get("add_special_tokens", True)
            )
            return {
                "count": len(tokens),
                "max_model_len": self.max_model_len,
                "tokens": tokens,
                "token_strs": None,
            }
        if path == "/detokenize":
            return {"prompt": self.tokenizer.decode(body["tokens"])}
        if self.dev_mode and path == "/reset_prefix_cache":
            return None
        if self.dev_mode and path == "/collective_rpc" and body["method"] == "reload_weights":
            self._reload(body["kwargs"]["weights_path"])
            return {"results": [None]}
        raise Refused(404, {"detail": "Not Found"})

    # vLLM

    def _completions(self, body: Any) -> Any:
        if (model := body.get("model")) not in (None, self.name):
            says = f"The model `{model}` does not exist. Valid aliases: {self.name}."
            raise _vllm_error(says, "model", status=404)
        if body.get("prompt") in (None, ""):
            raise _vllm_error("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        k = body.get("prompt_logprobs")
        if k is not None and not isinstance(k, int):
            raise _vllm_error("`prompt_logprobs` must be an integer.", "prompt_logprobs", k)
        if k and body.get("stream"):
            says = "`prompt_logprobs` are not available when `stream=True`."
            raise _vllm_error(says, "prompt_logprobs")
        if k is not None and k < -1:
            raise _vllm_error("`prompt_logprobs` must be a positive value or -1.", "prompt_logprobs", k)
        prompts = _prompts(body, self.tokenizer)
        if not prompts or not all(prompts):
            raise _vllm_error("You must pass at least one prompt")
        for ids in prompts:
            self._check_vllm(ids, body, k or 0)
        answer = {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 0,
            "model": self.name,
            "choices": [self._choice(index, ids, body, k) for index, ids in enumerate(prompts)],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": len(prompts)},
        }
        try:
            return _json(answer)
        except ValueError as error:
            raise _vllm_error(str(error)) from None

    def _reload(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        if not Path(folder, "config.json").is_file():
            raise Refused(500, {"error": {"message": f"Cannot find any model weights with `{folder}`"}})
        self.reloaded.append(folder)
        if not self.keeps_weights:
            read = AutoModelForCausalLM.from_pretrained(folder).state_dict()
            with self._model_lock:
                self.model.load_state_dict(read)

    def _sampled(self, prompt: list[int], body: Any) -> dict[str, Any]:
        """Sample as vLLM does, one token after the other."""
        random, ids, scores = torch.Generator().manual_seed(body["seed"] % 2**63), list(prompt), []
        ended = False
        while not ended and len(ids) - len(prompt) < body["max_tokens"]:
            logprobs = self._logprobs(ids)[-1]
            if logprobs.isnan().any():
                raise _vllm_error("Out of range float values are not JSON compliant: nan")
            if body["temperature"] == 0:
                token = int(logprobs.argmax())
            else:
                shares, order = (logprobs / body["temperature"]).softmax(-1).sort(descending=True)
                shares[shares.cumsum(0) - shares > body["top_p"]] = 0
                token = int(order[torch.multinomial(shares, 1, generator=random)])
            ids.append(token)
            scores.append(float(logprobs[token]))
            ended = token in body["stop_token_ids"]
        new = ids[len(prompt) :]
        self.generated.append(new)
        reason, self.ends_by = self.ends_by, None
        return {
            "index": 0,
            "text": "" if self.tokenizer is None else self.tokenizer.decode(new),
            "logprobs": {"token_logprobs": scores},
            "finish_reason": reason or ("stop" if ended else "length"),
            "token_ids": new,
        }

    def _choice(self, index: int, ids: list[int], body: Any, k: int | None) -> dict[str, Any]:
        if "stop_token_ids" in body:
            return self._sampled(ids, body)
        logprobs = self._logprobs(ids)
        following = int(logprobs[-1].argmax())
        echoed = "" if self.tokenizer is None or not body.get("echo") else self.tokenizer.decode(ids)
        with_ids, beams = body.get("return_token_ids"), body.get("use_beam_search")
        return {
            "index": index,
            "text": echoed + ("" if body.get("max_tokens") == 0 else self._text(following) or ""),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [following] if with_ids else None,
            "prompt_logprobs": None if k is None or beams else self._prompt_logprobs(ids, logprobs, k),
            "prompt_token_ids": ids if with_ids else None,
        }

    def _check_vllm(self, ids: Sequence[int], body: Any, k: int) -> None:
        length, context, new = len(ids), self.max_model_len, body.get("max_tokens", 16)
        if length > context:
            count = f"at least {length}" if length == context + 1 else length
            says = f"This model's maximum context length is {context} tokens. However, your prompt contains {count}"
            says += " input tokens, which exceeds this limit even without any output tokens. Please reduce the length"
            raise _vllm_error(f"{says} of the input prompt.", "input_tokens", length)
        if self.vocab is not None and max(ids) >= self.vocab:
            raise _vllm_error(f"Token id {max(ids)} is out of vocabulary")
        if (new := min(new, context - length)) < 1 and not body.get("echo"):
            raise _vllm_error(f"max_tokens must be at least 1, got {new}.", "max_tokens", new)
        asked = (self.vocab or 1 << 30) if k == -1 else k
        if asked > self.max_logprobs != -1:
            says = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
            raise _vllm_error(says, "prompt_logprobs", asked)

    def _prompt_logprobs(self, ids: Sequence[int], logprobs: torch.Tensor, k: int) -> list[Any]:
        count = logprobs.shape[1] if k == -1 else k
        best = logprobs[:-1].topk(count)
        top_ids, top = best.indices.tolist(), best.values.tolist()
        there = logprobs[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None])
        ranks, there = (logprobs[:-1] >= there).sum(1).tolist(), there[:, 0].tolist()
        said: list[Any] = [None]
        for at, token in enumerate(ids[1:]):
            entries = [
                (token, there[at], ranks[at]),
                *zip(top_ids[at], top[at], range(1, count + 1), strict=True),
            ]
            said.append({str(id_): self._entry(id_, logprob, rank) for id_, logprob, rank in entries})
        return said

    def _entry(self, id_: int, logprob: float, rank: int) -> dict[str, Any]:
        logprob = -9999.0 if logprob == float("-inf") else logprob
        return {"logprob": logprob, "rank": rank, "decoded_token": self._text(id_)}

    # SGLang

    def _generate(self, body: Any) -> Any:
        if "input_ids" not in body and "text" not in body:
            raise Refused(
                400, {"error": {"message": "Either text, input_ids or input_embeds should be provided."}}
            )
        ids = body.get("input_ids")
        if ids is not None and not (isinstance(ids, list) and ids):
            raise Refused(400, {"error": "input_ids: expected a non-empty array of integers"})
        prompts = _prompts(body, self.tokenizer)
        answers = [self._generated(ids, body) for ids in prompts]
        single = not isinstance(body.get("input_ids", body.get("text"))[0], list) and len(prompts) == 1
        return _json(_as_orjson(answers[0] if single else answers))

    def _generated(self, ids: list[int], body: Any) -> Any:
        length, context = len(ids), self.max_model_len
        new = (body.get("sampling_params") or {}).get("max_new_tokens", 128)
        if length >= context:
            says = (
                f"The input ({length} tokens) is longer than the model's context length ({context} tokens)."
            )
            raise Refused(400, {"error": {"message": says}})
        if new < 0:
            raise Refused(400, {"error": {"message": f"max_new_tokens must be at least 0, got {new}."}})
        start = body.get("logprob_start_len", -1)
        start = length if start == -1 else start
        if body.get("return_logprob") and start > length:
            says = f"req.logprob_start_len={start} is higher than the number of input tokens "
            says += f"len(req.origin_input_ids)={length}. Please use a smaller logprob_start_len."
            raise Refused(400, {"error": {"message": says}})
        logprobs = self._logprobs(ids)
        following = int(logprobs[-1].argmax())
        reason = {"type": "length", "length": new}
        meta: dict[str, Any] = {"id": "0", "finish_reason": reason, "prompt_tokens": length}
        meta |= {"weight_version": "default", "completion_tokens": min(new, 1), "cached_tokens": 0}
        if body.get("return_logprob"):
            meta |= self._input_logprobs(ids, logprobs, start, body)
        output = [following] if new else []
        return {"text": self._text(following) if new else "", "output_ids": output, "meta_info": meta}

    def _input_logprobs(
        self, ids: list[int], logprobs: torch.Tensor, start: int, body: Any
    ) -> dict[str, Any]:
        text = self._text if body.get("return_text_in_logprobs") else lambda _: None
        last = logprobs.shape[1] - 1
        known = logprobs[start:-1]  # these predict the tokens after `start`
        there = known.gather(1, torch.tensor(ids[start + 1 :], dtype=torch.long)[:, None])[:, 0].tolist()
        tokens = [id_ if id_ < last else 0 for id_ in ids[start:]]
        scores = zip([None, *there], tokens, strict=True) if tokens else ()
        meta: dict[str, Any] = {"input_token_logprobs": [[score, id_, text(id_)] for score, id_ in scores]}
        if k := body.get("top_logprobs_num", 0):
            best = known.topk(min(k, last + 1))
            if body.get("return_flat_raw_top_logprobs"):
                meta |= _flat(best.values, best.indices, body.get("return_flat_raw_top_logprobs_b64", False))
            else:
                rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
                top = [[[score, id_, text(id_)] for score, id_ in zip(*row, strict=True)] for row in rows]
                meta["input_top_logprobs"] = [None, *top] if tokens else []
        if chosen := body.get("token_ids_logprob"):
            rows = known[:, chosen].tolist()
            scored = [
                [[score, id_, text(id_)] for score, id_ in zip(row, chosen, strict=True)] for row in rows
            ]
            meta["input_token_ids_logprobs"] = [None, *scored] if tokens else []
        return meta | {"output_token_logprobs": [], "output_token_logprobs_length": 0}

    # The model

    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        if self.wrong_ids:
            ids[:] = ids[::-1]
        with self._model_lock, torch.inference_mode():
            if not isinstance(self.model, torch.nn.Module):
                return torch.as_tensor(np.asarray(self.model(ids)))
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

    def _text(self, id_: int) -> str | None:
        return None if self.tokenizer is None else _decoded(self.tokenizer, id_)


@lru_cache(maxsize=1 << 18)
def _decoded(tokenizer: Any, id_: int) -> str:
    return str(tokenizer.decode([id_]))


def _prompts(body: Any, tokenizer: Any = None) -> list[list[int]]:
    given = body["prompt"] if "prompt" in body else body.get("input_ids", body.get("text"))
    each = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    return [tokenizer.encode(one) if isinstance(one, str) else list(one) for one in each]


def _vllm_error(says: str, param: str | None = None, value: Any = None, *, status: int = 400) -> Refused:
    if param not in (None, "model"):
        says += f" (parameter={param}{'' if value is None else f', value={value}'})"
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    return Refused(status, {"error": {"message": says, "type": kind, "param": param, "code": status}})


def _flat(values: torch.Tensor, ids: torch.Tensor, as_base64: bool) -> dict[str, Any]:
    parts = {"val": values.numpy().astype("<f4"), "idx": ids.numpy().astype("<i4")}
    said: dict[str, Any] = {
        "input_top_logprobs_shape": list(values.shape),
        "input_top_logprobs_null_prefix": 1,
    }
    for name, part in parts.items():
        key = f"input_top_logprobs_{name}_flat"
        if as_base64:
            said[f"{key}_b64"] = base64.b64encode(part.tobytes()).decode()
            said[f"{key}_b64_dtype"] = part.dtype.name
        else:
            said[key] = part.reshape(-1).tolist()
    return said


def _json(value: Any) -> bytes:
    """Write JSON as short as both engines do."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def _as_orjson(value: Any) -> Any:
    """Put null where a number is not finite, as orjson does."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _as_orjson(each) for key, each in value.items()}
    return [_as_orjson(each) for each in value] if isinstance(value, list) else value


# HTTP


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, scoring: ScoringServer) -> None:
        self.scoring = scoring
        self.open: set[socket.socket] = set()
        self.handlers: list[Thread] = []
        super().__init__(("127.0.0.1", scoring.port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        thread = Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self.handlers = [each for each in self.handlers if each.is_alive()] + [thread]
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed from the other side
                continue
        for thread in self.handlers:
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self.answer(json.loads(text))
        except json.JSONDecodeError as error:
            self.send(
                400, {"error": {"message": str(error), "type": "Bad Request", "param": None, "code": 400}}
            )

    def answer(self, body: Any) -> None:
        scoring, request = self.server.scoring, Request(self.path, body, dict(self.headers.items()))
        scoring.requests.append(request)
        counted = scoring.counted() if self.path == SCORING[scoring.engine] else nullcontext()
        with ExitStack() as sending:
            try:
                with counted:
                    content, fault = self.content(request, sending)
            except Refused as refused:
                self.send(refused.status, refused.body)
                return
            if fault is None:
                scoring.answered.append(request)
                self.send(200, content)
            elif fault == "cut":
                self.send(200, content, cut=True)
            else:
                self.close_connection = True

    def content(self, request: Request, sending: ExitStack) -> tuple[Any, Fault | None]:
        scoring = self.server.scoring
        guarded = self.path.startswith("/v1") if scoring.engine == "vllm" else self.path != "/health"
        if guarded and scoring.api_key not in (None, self.key()):
            raise Refused(401, {"error": "Unauthorized"})
        if request.body is None:
            return scoring.get(self.path), None
        fault = scoring.fault() if self.path == SCORING[scoring.engine] else None
        if isinstance(fault, int):
            raise Refused(fault, _failure(scoring.engine, fault))
        if fault == "hang":
            scoring.stopped.wait()
            return None, fault
        content = scoring.post(self.path, request.body)
        sending.enter_context(scoring.turn())
        return content, fault

    def key(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def send(self, status: int, body: Any, *, cut: bool = False) -> None:
        content = body if isinstance(body, bytes) else b"" if body is None else _json(body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection |= cut
        self.wfile.flush()


def _failure(engine: Engine, status: int) -> Any:
    message = "Internal server error" if status == 500 else f"HTTP {status}"
    if engine == "sglang":
        return {"object": "error", "message": message, "type": str(status), "param": None, "code": status}
    return {"error": {"message": message, "type": "InternalServerError", "param": None, "code": status}}


def main() -> None:
    from cdm_toolkit.hub.models import load_model
    from cdm_toolkit.hub.tokenizers import load_tokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="alias, folder or hub id")
    parser.add_argument("--served-model-name", help="what requests call it (default: --model)")
    parser.add_argument("--engine", choices=tuple(SCORING), default="vllm")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--max-logprobs", type=int, default=20)
    options = parser.parse_args()
    model = load_model(options.model)
    with ScoringServer(
        model,
        engine=options.engine,
        name=options.served_model_name or options.model,
        tokenizer=load_tokenizer(options.model).tokenizer,
        vocab=model.config.vocab_size,
        max_logprobs=options.max_logprobs,
        port=options.port,
    ) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
