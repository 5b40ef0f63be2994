"""Client of servers that score sequences: many requests in flight over several servers, none of them trusted.

It runs in one thread of its own (asyncio). What fails is asked again, of another server where there is one. Each server
shows by a probe, a text whose scores are known, that it still has the model that the first one had: when it is first
asked, and whenever a connection to it was made anew.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as first_of
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cdm_toolkit.errors import ServerProblem
from cdm_toolkit.teachers.engines import ENGINES, BadAnswer, EngineName, Refusal, Scored, within_vocabulary
from cdm_toolkit.teachers.server_requests import Failed, is_retryable, key_header, why

if TYPE_CHECKING:
    import httpx2

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds for which a server is left out after a failure; doubled at each further one."""
SAME_MODEL = 0.1
"""Nats by which the scores of a probe may differ in the mean: what batches and kernels change is far less."""


Logprobs = Sequence[float] | np.ndarray


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a model is served, and how it is asked."""

    urls: tuple[str, ...]
    model: str
    engine: EngineName = "vllm"
    api_key_env: str | None = None
    in_flight: int = 32
    timeout: float = 120.0
    patience: float = 300.0

    @property
    def headers(self) -> dict[str, str]:
        """Give the header with the key. BadOption where the variable is not set."""
        return key_header(self.api_key_env)


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A text whose scores tell one model from another."""

    ids: tuple[int, ...]
    k: int


class _Server:
    """What is known of one server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.busy = self.failures = 0
        self.seconds = 0.0
        """Of a request, lately."""
        self.left_out_until = 0.0
        self.connected, self.proved = 0, -1
        """Connections made so far, and those that there were when it was last proved."""
        self.proving = asyncio.Lock()

    def failed(self) -> None:
        now = time.monotonic()
        if self.left_out_until <= now:  # of several requests that fail together the first counts
            self.left_out_until = now + min(FIRST_PAUSE * 2 ** min(self.failures, 6), LONGEST_PAUSE)
            self.failures += 1

    def answered(self, seconds: float) -> None:
        self.failures = 0
        self.seconds = seconds if not self.seconds else 0.8 * self.seconds + 0.2 * seconds


class ScoringClient:
    """Scores of sequences, from the servers of one model."""

    def __init__(self, settings: ServerSettings, *, vocab: int) -> None:
        """Start the thread; nothing is asked yet. BadOption."""
        import httpx2

        self.settings, self.engine, self.vocab = settings, ENGINES[settings.engine], vocab
        self.bytes_received = self.retries = 0
        self.probe: Probe | None = None
        self.probe_scores: Scored | None = None
        self._lost: ServerProblem | None = None
        self._httpx = httpx2
        headers = settings.headers | {"Content-Type": "application/json"}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scoring-client", daemon=True)
        self._thread.start()
        self._servers = [_Server(url) for url in settings.urls]
        self._client, self._room = self._run(self._opened(headers)).result()

    async def _opened(self, headers: dict[str, str]) -> tuple[httpx2.AsyncClient, asyncio.Semaphore]:
        many = self.settings.in_flight
        client = self._httpx.AsyncClient(
            headers=headers,
            timeout=self._httpx.Timeout(self.settings.timeout, pool=None),
            # both engines close a connection that was idle for 5 s
            limits=self._httpx.Limits(
                max_connections=None, max_keepalive_connections=many, keepalive_expiry=3.0
            ),
            follow_redirects=False,
            trust_env=True,
        )
        return client, asyncio.Semaphore(many)

    def _run(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def submit(self, ids: Sequence[int], first: int, k: int) -> Future[Scored]:
        """Ask for the k likeliest candidates of what follows each token of `ids` from `first` on.

        The result raises ServerProblem for a request that is refused, or that no server has answered for `patience`
        seconds.
        """
        return self._run(self._patiently(list(map(int, ids)), first, k))

    def connect(self, probe: Probe) -> tuple[Scored, list[str]]:
        """Ask each server about the probe, once. Gives the scores, and what is wrong with servers that are left out.

        Raises what the first server has against it where none answers; Refusal as it is; ServerProblem where two
        servers have different models.
        """
        self.probe = probe
        scores, problems = None, list[ServerProblem]()
        for server in self._servers:
            try:
                found = self._run(self._ask(server, probe.ids, 0, probe.k)).result()
            except Failed as failed:
                server.failed()
                problems.append(_not_answering(server.url, str(failed)))
                continue
            if scores is not None and (other := other_model(scores.token_logprobs, found.token_logprobs)):
                problem = f"serves another model than {self._servers[0].url} ({other})"
                raise ServerProblem(server.url, problem, "give servers of one model")
            scores, server.proved = found, server.connected
        if scores is None:
            raise problems[0]
        self.probe_scores = scores
        return scores, [str(problem) for problem in problems]

    def texts(self, ids: Sequence[int], k: int) -> Mapping[int, str]:
        """Give the texts that the first server that answers has for these ids, and for `k` candidates after each.

        ServerProblem where none answers.
        """
        request = self.engine.request(self.settings.model, ids, 0, k, texts=True)
        problems = list[ServerProblem]()
        for server in self._servers:
            try:
                return self.engine.texts(self._run(self._posted(server, request)).result())
            except (Failed, BadAnswer) as failed:
                problems.append(_not_answering(server.url, str(failed)))
            except Refusal as refusal:
                raise refused(refusal) from None
        raise problems[0]

    def longest(self) -> int | None:
        """Give how many tokens a sequence may have, by the servers' lists of their models; None where none tells.

        It is one less than the context: an engine generates a token after the prompt.
        """
        found = self._run(self._contexts()).result()
        return min(found) - 1 if found else None

    async def _contexts(self) -> list[int]:
        found = []
        for server in self._servers:
            try:
                answer = await self._client.get(f"{server.url}/v1/models")
                models = answer.json()["data"]
                named = [one for one in models if one["id"] == self.settings.model] or models
                found.append(int(named[0]["max_model_len"]))
            except (self._httpx.HTTPError, ValueError, LookupError, TypeError):
                continue
        return found

    def close(self) -> None:
        """Give up all requests, and end the thread."""
        if self._loop.is_closed():
            return
        self._run(self._closed()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _closed(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _patiently(self, ids: list[int], first: int, k: int) -> Scored:
        """Ask until there is an answer, or patience is at its end."""
        async with self._room:
            began = time.monotonic()
            while True:
                if self._lost is not None:
                    raise self._lost
                server = await self._free_server()
                try:
                    scored = await self._ask(server, ids, first, k)
                    await self._proved(server)
                except Failed as failed:
                    server.failed()
                    self.retries += 1
                    if time.monotonic() - began > self.settings.patience:
                        self._lost = ServerProblem(
                            server.url,
                            f"has not answered a request for {self.settings.patience:.0f} s ({failed.reason})",
                            "start it again, or raise `patience`",
                        )
                except Refusal as refusal:
                    raise refused(refusal) from None
                else:
                    return scored

    async def _free_server(self) -> _Server:
        """Choose the server that will answer first; wait for one where all are left out."""
        while True:
            now = time.monotonic()
            # one that failed is tried by a single request
            here: list[_Server] = [
                server
                for server in self._servers
                if server.left_out_until <= now and not (server.failures and server.busy)
            ]
            if here:
                return min(here, key=lambda server: (server.busy + 1) * max(server.seconds, 1e-3))
            await asyncio.sleep(max(0.05, min(server.left_out_until for server in self._servers) - now))

    async def _ask(self, server: _Server, ids: Sequence[int], first: int, k: int) -> Scored:
        """Ask one server once. Failed for what may go better another time, Refusal for what will not."""
        began = time.monotonic()
        body = await self._posted(server, self.engine.request(self.settings.model, ids, first, k))
        try:
            scored = within_vocabulary(self.engine.read(body, ids, first, k), self.vocab)
        except BadAnswer as bad:
            raise Failed(f"gives an answer that cannot be used: {bad}") from None
        server.answered(time.monotonic() - began)
        return scored

    async def _posted(self, server: _Server, request: Mapping[str, Any]) -> bytes:
        async def trace(event: str, _facts: Any) -> None:
            if event == "connection.connect_tcp.complete":
                server.connected += 1

        server.busy += 1
        try:
            async with asyncio.timeout(self.settings.timeout):
                answer = await self._client.post(
                    server.url + self.engine.path,
                    content=json.dumps(request, separators=(",", ":")),
                    extensions={"trace": trace},
                )
        except (TimeoutError, self._httpx.TimeoutException):
            raise Failed(f"took more than {self.settings.timeout:g} s") from None
        except self._httpx.RequestError as error:
            raise Failed(f"cannot be reached ({why(error)})") from None
        finally:
            server.busy -= 1
        if is_retryable(answer.status_code):
            reason = self.engine.refusal(answer.content).reason
            raise Failed(f"answers HTTP {answer.status_code}: {reason}")
        if answer.status_code != 200:
            self._refuse(server, answer.status_code, answer.content)
        content: bytes = answer.content
        self.bytes_received += len(content)
        return content

    def _refuse(self, server: _Server, status: int, body: bytes) -> None:
        refusal = self.engine.refusal(body)
        refusal.url = server.url
        if status in (401, 403):
            name = self.settings.api_key_env
            fix = (
                f"check the key in {name}"
                if name
                else "name the variable that holds its key by `api_key_env`"
            )
            raise ServerProblem(server.url, f"asks for a key (HTTP {status})", fix)
        if status == 404:
            fix = f"check that it runs {self.settings.engine}, and the name of the `model`"
            raise ServerProblem(
                server.url,
                f"has no {self.engine.path}, or no model {self.settings.model!r}: {refusal.reason}",
                fix,
            )
        raise refusal

    async def _proved(self, server: _Server) -> None:
        """Ask the probe again where connections were made since the last time: the server may have been restarted."""
        if self.probe is None or self.probe_scores is None or server.proved >= server.connected:
            return
        async with server.proving:
            while server.proved < server.connected:
                there = server.connected
                found = await self._ask(server, self.probe.ids, 0, self.probe.k)
                if other := other_model(self.probe_scores.token_logprobs, found.token_logprobs):
                    self._lost = ServerProblem(
                        server.url,
                        f"serves another model than before ({other})",
                        "start it with the model that it had",
                    )
                    raise self._lost
                server.proved = there


def other_model(known: Logprobs, found: Logprobs) -> str:
    """Say how far scores of the probe are from those that are known, where that is too far for one model."""
    if len(known) != len(found):
        return f"it scores {len(found)} tokens in place of {len(known)}"
    apart = float(np.abs(np.subtract(known, found)).mean())
    return "" if apart <= SAME_MODEL else f"scores of the same text are {apart:.2f} nats a token apart"


def refused(refusal: Refusal) -> ServerProblem:
    """Make the error of a request that a server refuses."""
    problem = f"refuses a request: {refusal.reason}"
    return ServerProblem(refusal.url, problem, "give what it allows, or start it otherwise")


def _not_answering(url: str, reason: str) -> ServerProblem:
    return ServerProblem(url, reason, "start it, or check `url`")


def wait(
    futures: Sequence[Future[Scored]], stopping: Callable[[], bool] = lambda: False
) -> list[Scored] | None:
    """Wait for answers; None when `stopping` is True before they are there."""
    for future in futures:
        while not future.done():
            if stopping():
                return None
            first_of([future], timeout=0.2)
        if future.cancelled():
            return None
    return [future.result() for future in futures]
