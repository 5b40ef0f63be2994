"""A vLLM server that samples from the student: before each draw it reads the student's weights anew, from a folder.

vLLM (0.32) has the endpoints that this needs in its development mode: `POST /collective_rpc` runs a method of the
workers, of which `reload_weights` reads weights from a folder, and `POST /reset_prefix_cache` drops the keys and
values of earlier ones. Texts come from `POST /v1/completions`, one request each, with ids in both directions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cdm_toolkit.distill.generate import NotFiniteLogits, Prompt, ends_of, room_after
from cdm_toolkit.errors import FileProblem, ServerProblem
from cdm_toolkit.forward import as_it_was
from cdm_toolkit.teachers.engines import ENGINES
from cdm_toolkit.teachers.scoring_client import ServerSettings, why
from cdm_toolkit.teachers.served import Stopped

if TYPE_CHECKING:
    import httpx2

    from cdm_toolkit.distill.settings import OnPolicyConfig
    from cdm_toolkit.kd.tokenized_rows import TokenizerSide

IN_FLIGHT = 64
"""Requests that are open at once, in each process: the server batches them."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds before a draw that has failed is begun anew; doubled each time."""
SAME_WEIGHTS = 0.2
"""Nats a token by which student and server may differ about a sample: in bfloat16 they do by a few hundredths."""
LOOKED_AT = 64
"""Tokens of a sample that are compared."""
RELOAD = "/collective_rpc"
START = "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT"


@dataclass(frozen=True, slots=True)
class _Drawn:
    ids: list[int]
    logprobs: list[float]


class VLLMServer:
    """A server of the student, on this machine or on one that sees the folder of weights under the same path."""

    def __init__(self, settings: OnPolicyConfig, student: str, weights: Path) -> None:
        """Name the folder that weights are written to; nothing is asked yet. BadOption for a key that is not set."""
        import httpx2

        assert settings.url is not None
        self.url, self.patience, self._httpx = settings.url, settings.patience, httpx2
        self.weights = weights
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run is told to end: a draw that fails is then not begun anew."""
        self._student, self._model, self._at = student, "", weights
        given = ServerSettings((self.url,), student, api_key_env=settings.api_key_env)
        self._client: httpx2.Client = httpx2.Client(
            headers=given.headers | {"Content-Type": "application/json"},
            timeout=settings.timeout,
            limits=httpx2.Limits(max_connections=IN_FLIGHT, keepalive_expiry=3.0),
        )

    def connect(self, longest: int) -> None:
        """See that it is there, and that it takes texts of so many tokens. ServerProblem."""
        try:
            found = json.loads(self._asked("GET", "/v1/models"))["data"][0]
            self._model, context = str(found["id"]), int(found["max_model_len"])
        except _Failed as failed:
            raise ServerProblem(self.url, failed.reason, f"start it ({START}), or check `url`") from None
        except (ValueError, LookupError, TypeError):
            raise ServerProblem(self.url, "has no list of models", "check that it runs vLLM") from None
        if context < longest:
            problem = f"takes {context:,} tokens, and prompts with their samples have up to {longest:,}"
            raise ServerProblem(self.url, problem, "start it with a longer context, or lower `max_length`")

    def renew(self, student: Any, step: int) -> None:
        """Write the student's weights of a step, and let the server read them. FileProblem, ServerProblem, Stopped."""
        self._at = self.weights / f"step-{step}"
        before = [path for path in self.weights.glob("step-*") if path != self._at]
        try:
            student.save_pretrained(self._at)
        except OSError as error:
            problem = f"the student's weights cannot be written there ({error.strerror or error})"
            fix = "make room, or give another folder as `on_policy.weights`"
            raise FileProblem(self.weights, problem, fix) from None
        self._patiently(lambda _: self._reload())
        for path in before:
            shutil.rmtree(path, ignore_errors=True)

    def sample(
        self,
        student: Any,
        prompts: Sequence[Prompt],
        settings: OnPolicyConfig,
        side: TokenizerSide,
        max_length: int,
        step: int,
        seed: int,
    ) -> list[list[int]]:
        """Continue prompts with the weights of a step, which it was given, as `generate.sample_ids` does.

        A draw that fails is begun anew until `patience` is at its end, weights included: a server that was started
        again has its first ones. ServerProblem, also for one that samples from other weights than the student's,
        Stopped, NotFiniteLogits.
        """
        self._at, ends = self.weights / f"step-{step}", ends_of(side, student)

        def draw(again: bool) -> list[_Drawn]:
            if again:
                self._reload()
            return self._draw(prompts, settings, ends, max_length, seed)

        drawn = self._patiently(draw)
        self._check_weights(student, prompts, drawn)
        return [each.ids for each in drawn]

    def close(self) -> None:
        """Close the connections, and remove the weights."""
        self._client.close()
        shutil.rmtree(self.weights, ignore_errors=True)

    def _patiently(self, work: Callable[[bool], Any]) -> Any:
        """Do what may fail until it is done; it is told whether it has failed before."""
        began, pause, again = time.monotonic(), FIRST_PAUSE, False
        while True:
            try:
                return work(again)
            except _Failed as failed:
                if time.monotonic() - began > self.patience:
                    problem = f"has not sampled for {self.patience:.0f} s ({failed.reason})"
                    fix = "start it again, or raise `on_policy.patience`"
                    raise ServerProblem(self.url, problem, fix) from None
            until, pause, again = time.monotonic() + pause, min(2 * pause, LONGEST_PAUSE), True
            while time.monotonic() < until:
                if self.stopping():
                    raise Stopped
                time.sleep(0.1)

    def _reload(self) -> None:
        path = str(self._at.resolve())
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        self._asked("POST", RELOAD, body, timeout=self.patience)  # a large model is read for minutes
        self._asked("POST", "/reset_prefix_cache", {})

    def _draw(
        self,
        prompts: Sequence[Prompt],
        settings: OnPolicyConfig,
        ends: Sequence[int],
        max_length: int,
        seed: int,
    ) -> list[_Drawn]:
        wanted = [
            {
                "model": self._model,
                "prompt": prompt.ids.tolist(),
                "max_tokens": room_after(prompt, settings, max_length),
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                # a model's own defaults, which a server would take
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "seed": _seed_of(seed, nth),
                "stop_token_ids": list(ends),
                "return_token_ids": True,
                "logprobs": 0,
            }
            for nth, prompt in enumerate(prompts)
        ]
        if not wanted:
            return []
        with ThreadPoolExecutor(min(IN_FLIGHT, len(wanted)), "vllm-server") as pool:
            return list(pool.map(partial(self._completed, ends=frozenset(ends)), wanted))

    def _completed(self, body: dict[str, Any], ends: frozenset[int]) -> _Drawn:
        answer = self._asked("POST", "/v1/completions", body)
        try:
            choice = json.loads(answer)["choices"][0]
            ids, logprobs = list(map(int, choice["token_ids"])), choice["logprobs"]["token_logprobs"]
        except (ValueError, LookupError, TypeError):
            problem = "answers without the ids of what it sampled"
            raise ServerProblem(self.url, problem, "check that it runs vLLM 0.10 or newer") from None
        until = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
        return _Drawn(ids[:until], logprobs[:until])

    def _asked(self, verb: str, path: str, body: Any = None, timeout: float | None = None) -> bytes:
        """Make one request. _Failed for what may go better another time, ServerProblem for what will not."""
        content = None if body is None else json.dumps(body)
        limit = self._client.timeout if timeout is None else self._httpx.Timeout(timeout)
        try:
            answer = self._client.request(verb, self.url + path, content=content, timeout=limit)
        except self._httpx.TimeoutException:
            raise _Failed("takes too long to answer") from None
        except self._httpx.RequestError as error:
            raise _Failed(f"cannot be reached ({why(error)})") from None
        status = answer.status_code
        if status == 200:
            return bytes(answer.content)
        reason = f"HTTP {status}: {ENGINES['vllm'].refusal(answer.content).reason}"
        if status in (401, 403):
            raise ServerProblem(self.url, f"asks for a key ({reason})", "give `on_policy.api_key_env`")
        if path == RELOAD:
            fix = f"start it with {START}"
            if status != 404:
                fix = f"look at its log; it has to see {self._at} under this path"
            raise ServerProblem(self.url, f"does not take the student's weights ({reason})", fix)
        if status >= 500 or status in (408, 425, 429):
            raise _Failed(f"answers {reason}")
        raise ServerProblem(self.url, f"refuses a request ({reason})", "give what it allows")

    def _check_weights(self, student: Any, prompts: Sequence[Prompt], drawn: Sequence[_Drawn]) -> None:
        """See that a sample is of the student as it is. ServerProblem, NotFiniteLogits."""
        if not drawn:
            return
        prompt, ids = prompts[0].ids, drawn[0].ids[:LOOKED_AT]
        device = next(student.parameters()).device
        whole = torch.tensor([[*prompt.tolist(), *ids]], device=device)
        with as_it_was(student, device):
            logits = student(input_ids=whole).logits[0, len(prompt) - 1 : -1].float()
        own = logits.log_softmax(-1).gather(1, whole[0, len(prompt) :, None])[:, 0]
        if not bool(own.isfinite().all()):
            raise NotFiniteLogits
        apart = float(np.abs(own.cpu().numpy() - np.array(drawn[0].logprobs[: len(ids)], np.float32)).mean())
        if not apart <= SAME_WEIGHTS:
            problem = f"samples from another model than the student ({apart:.2f} nats a token apart)"
            raise ServerProblem(self.url, problem, f"start it with {self._student}")


class _Failed(Exception):
    """A request that may go better another time."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def _seed_of(seed: int, nth: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {nth}".encode()).digest()[:7], "big")
