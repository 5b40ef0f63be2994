"""A vLLM server that samples from the student: before each draw it reads the student's weights anew, from a folder.

vLLM (0.32) has what this needs in its development mode: `POST /collective_rpc` runs a method of the workers, of which
`reload_weights` reads weights from a folder. Texts come from `POST /v1/completions`, one request each, with ids in both
directions; a `cache_salt` of each draw keeps keys and values of earlier weights out of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as first_of
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.artifacts.lock import locked
from cdm_toolkit.distill.generate import NotFiniteLogits, Prompt, ends_of, room_after, up_to_end
from cdm_toolkit.distill.output_folder import WEIGHTS
from cdm_toolkit.errors import ServerProblem
from cdm_toolkit.forward import as_it_was, logits_at
from cdm_toolkit.teachers.engines import ENGINES
from cdm_toolkit.teachers.served import Stopped
from cdm_toolkit.teachers.server_requests import Failed, is_retryable, key_header, why

if TYPE_CHECKING:
    import httpx2

    from cdm_toolkit.distill.settings import OnPolicyConfig
    from cdm_toolkit.kd.tokenized_rows import TokenizerSide

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds before what has failed is done again; doubled each time."""
SAME_WEIGHTS = 0.2
"""Nats a token by which student and server may differ about a sample: in bfloat16 they do by a few hundredths."""
LOOKED_AT = 64
"""Tokens of a sample that are compared."""
RELOAD, SAMPLE = "/collective_rpc", "/v1/completions"


@dataclass(frozen=True, slots=True)
class _Drawn:
    ids: list[int]
    logprobs: list[float]


class VLLMServer:
    """A server of the student, on this machine or on one that sees the folder of weights under the same path."""

    def __init__(self, settings: OnPolicyConfig, student: str, output: Path) -> None:
        """Nothing is asked yet; weights go to a folder of the run's own. BadOption for a key that is not set."""
        import httpx2

        assert settings.url is not None
        self.url, self.settings, self._httpx = settings.url, settings, httpx2
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run is told to end, also while it waits."""
        own = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:12]
        self._folder = Path(settings.weights or output) / f"{WEIGHTS}{own}"
        self._written: list[Path] = []
        self._student, self._model, self._nonce = student, "", uuid.uuid4().hex
        self._pool = ThreadPoolExecutor(settings.in_flight, "vllm-server")
        self._client: httpx2.Client = httpx2.Client(
            headers=key_header(settings.api_key_env) | {"Content-Type": "application/json"},
            timeout=httpx2.Timeout(settings.timeout, connect=10.0, pool=None),
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=3.0),
        )

    @property
    def _start(self) -> str:
        return f"start it with VLLM_SERVER_DEV_MODE=1 vllm serve {self._student}"

    def connect(self, longest: int) -> None:
        """See that it is there, takes weights, and has room for texts of so many tokens. ServerProblem."""
        try:
            found = json.loads(self._asked("GET", "/v1/models"))["data"][0]
            self._model, context = str(found["id"]), int(found["max_model_len"])
            self._asked("POST", "/reset_prefix_cache", {})  # is there where weights are taken
        except Failed as failed:
            raise ServerProblem(self.url, failed.reason, f"{self._start}, or check `on_policy.url`") from None
        except (ValueError, LookupError, TypeError):
            raise ServerProblem(self.url, "has no list of models", "check that it runs vLLM") from None
        if context < longest:
            problem = f"takes {context:,} tokens, and prompts with their samples have up to {longest:,}"
            raise ServerProblem(self.url, problem, "start it with a longer context, or lower `max_length`")

    def lock(self) -> AbstractContextManager[None]:
        """Keep the server from other runs of this machine, which would give it their weights. ServerProblem."""

        def taken() -> None:
            fix = "wait for the end of that one, or start another server"
            raise ServerProblem(self.url, "samples for another run", fix)

        name = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        return locked(cache_folder() / "locks" / f"vllm-{name}.lock", taken)

    def update_weights(self, student: Any, step: int) -> None:
        """Write the student's weights of a step, and let the server read them. ServerProblem, Stopped."""
        folder = self._at(step)
        try:
            self._written.append(folder)
            student.save_pretrained(folder)
            for file in folder.iterdir():
                file.chmod(file.stat().st_mode | 0o444)  # the server may be another user's
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            problem = f"cannot be given the student's weights: {folder} cannot be written ({reason})"
            fix = "make room, or give another folder as `on_policy.weights`"
            raise ServerProblem(self.url, problem, fix) from None
        trouble = _Trouble(self)
        while not self._reloaded(folder, trouble):
            trouble.pause()
        for before in self._written[:-1]:
            if before != folder:
                shutil.rmtree(before, ignore_errors=True)
        self._written = [folder]

    def sample(
        self,
        student: Any,
        prompts: Sequence[Prompt],
        side: TokenizerSide,
        max_length: int,
        step: int,
        seed: int,
    ) -> list[list[int]]:
        """Continue prompts with the weights of a step, which it was given, as `generate.sample_ids` does.

        What fails is asked again until nothing has been sampled for `patience` seconds, after the weights were given
        again: a server that was started anew has its first ones. ServerProblem, also for one that samples from quite
        other weights than the student's, Stopped, NotFiniteLogits.
        """
        ends = ends_of(side, student)
        wanted = [
            self._request(
                prompt, room_after(prompt, self.settings, max_length), ends, step, _seed_of(seed, nth)
            )
            for nth, prompt in enumerate(prompts)
        ]
        try:
            drawn = self._drawn(wanted, self._at(step))
        except ServerProblem:
            if prompts and not self._logprobs(student, prompts[0], [ends[0] if ends else 0]).isfinite().all():
                raise NotFiniteLogits from None
            raise
        self._check_weights(student, prompts, drawn)
        return [each.ids for each in drawn]

    def close(self) -> None:
        """Close the connections, and remove the weights that were written here."""
        self._client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for folder in self._written:
            shutil.rmtree(folder, ignore_errors=True)
        if self._written and self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _at(self, step: int) -> Path:
        return self._folder / f"step-{step}"

    def _reloaded(self, folder: Path, trouble: _Trouble) -> bool:
        """Let the server read weights; False where that may go better another time."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        future = self._pool.submit(self._asked, "POST", RELOAD, body)
        for _ in self._ended([future]):
            try:
                future.result()
            except Failed as failed:
                trouble.happened(failed)
                return False
        return True

    def _request(
        self, prompt: Prompt, room: int, ends: Sequence[int], step: int, seed: int
    ) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt.ids.tolist(),
            "max_tokens": room,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            # a model's own defaults, which a server would take
            **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
            "seed": seed,
            "stop_token_ids": list(ends),
            "return_token_ids": True,
            "logprobs": 0,
            "cache_salt": f"{self._nonce}-{step}",
        }

    def _drawn(self, wanted: Sequence[dict[str, Any]], weights: Path) -> list[_Drawn]:
        """Ask for samples until all are there, and give the weights again after what has failed."""
        found: dict[int, _Drawn] = {}
        trouble = _Trouble(self)
        while missing := [nth for nth in range(len(wanted)) if nth not in found]:
            if trouble and not self._reloaded(weights, trouble):
                trouble.pause()
                continue
            asked = {self._pool.submit(self._sampled, wanted[nth]): nth for nth in missing}
            try:
                for future in self._ended(list(asked)):
                    found[asked[future]] = future.result()
                    trouble.is_over()
            except Failed as failed:
                for future in asked:
                    future.cancel()
                trouble.happened(failed)
                trouble.pause()
        return [found[nth] for nth in range(len(wanted))]

    def _ended(self, futures: Sequence[Future[Any]]) -> Iterator[Future[Any]]:
        """Give futures as they end. Stopped when the run is told to end before."""
        left = set(futures)
        while left:
            ended, left = first_of(left, timeout=0.2, return_when=FIRST_COMPLETED)
            if self.stopping():
                for future in left:
                    future.cancel()
                raise Stopped
            yield from ended

    def _sampled(self, request: dict[str, Any]) -> _Drawn:
        answer = self._asked("POST", SAMPLE, request)
        try:
            choice = json.loads(answer)["choices"][0]
            ids, logprobs = list(map(int, choice["token_ids"])), choice["logprobs"]["token_logprobs"]
            reason = choice["finish_reason"]
        except (ValueError, LookupError, TypeError):
            problem = "answers without the ids of what it sampled"
            raise ServerProblem(self.url, problem, "check that it runs vLLM 0.32 or newer") from None
        if reason not in ("stop", "length") or not ids:
            raise Failed(f"ended a sample by {reason!r}")
        ends = request["stop_token_ids"]
        until = up_to_end(ids, ends)
        if reason == "length" and until == len(ids) < request["max_tokens"]:
            problem = f"cuts samples at {len(ids)} tokens, not at {request['max_tokens']}"
            raise ServerProblem(self.url, problem, "start it without a limit of its own")
        return _Drawn(ids[:until], logprobs[:until])

    def _asked(self, verb: str, path: str, body: Any = None) -> bytes:
        """Make one request. Failed for what may go better another time, ServerProblem for what will not."""
        content = None if body is None else json.dumps(body)
        try:
            answer = self._client.request(verb, self.url + path, content=content)
        except self._httpx.TimeoutException:
            raise Failed("takes too long to answer") from None
        except (self._httpx.RequestError, RuntimeError) as error:  # RuntimeError: the client is closed
            raise Failed(f"cannot be reached ({why(error)})") from None
        status = answer.status_code
        if status == 200:
            return bytes(answer.content)
        reason = f"HTTP {status}: {ENGINES['vllm'].refusal(answer.content).reason}"
        if status in (401, 403):
            name = self.settings.api_key_env
            fix = f"check the key in {name}" if name else "give `on_policy.api_key_env`"
            raise ServerProblem(self.url, f"asks for a key ({reason})", fix)
        if path == RELOAD and status == 500 and self._is_well():
            problem = f"cannot read the student's weights in {body['kwargs']['weights_path']} ({reason})"
            raise ServerProblem(self.url, problem, "see that it has this folder, and start it again")
        if is_retryable(status):
            raise Failed(f"answers {reason}")
        if path != SAMPLE:
            raise ServerProblem(self.url, f"does not take the student's weights ({reason})", self._start)
        raise ServerProblem(self.url, f"refuses a request ({reason})", "give what it allows")

    def _is_well(self) -> bool:
        try:
            return bool(self._client.get(self.url + "/health").status_code == 200)
        except self._httpx.RequestError:
            return False

    def _check_weights(self, student: Any, prompts: Sequence[Prompt], drawn: Sequence[_Drawn]) -> None:
        """See that the longest sample is of the student as it is. ServerProblem, NotFiniteLogits."""
        if not drawn:
            return
        nth = max(range(len(drawn)), key=lambda nth: len(drawn[nth].ids))
        ids = drawn[nth].ids[:LOOKED_AT]
        own = self._logprobs(student, prompts[nth], ids)
        if not bool(own.isfinite().all()):
            raise NotFiniteLogits
        apart = float(np.abs(own.numpy() - np.array(drawn[nth].logprobs[: len(ids)], np.float32)).mean())
        if not apart <= SAME_WEIGHTS:
            problem = f"samples from another model than the student ({apart:.2f} nats a token apart)"
            fix = f"{self._start}, with log-probabilities as they are before temperature"
            raise ServerProblem(self.url, problem, fix)

    def _logprobs(self, student: Any, prompt: Prompt, ids: Sequence[int]) -> torch.Tensor:
        """Score a sample with the student."""
        device = next(student.parameters()).device
        whole = torch.tensor([[*prompt.ids.tolist(), *ids]], device=device)
        with as_it_was(student, device):
            at = torch.arange(len(prompt.ids) - 1, whole.shape[1] - 1, device=device)
            logits = logits_at(student, student.get_output_embeddings(), at, input_ids=whole)
            found = logits.float().log_softmax(-1).gather(1, whole[0, len(prompt.ids) :, None])[:, 0]
        return found.cpu()


class _Trouble:
    """How long a server has given nothing, and how long to wait before it is asked again."""

    def __init__(self, server: VLLMServer) -> None:
        self.server = server
        self.since: float | None = None
        self.seconds = FIRST_PAUSE

    def __bool__(self) -> bool:
        return self.since is not None

    def is_over(self) -> None:
        self.since, self.seconds = None, FIRST_PAUSE

    def happened(self, failed: Failed) -> None:
        """ServerProblem where patience is at its end."""
        now, patience = time.monotonic(), self.server.settings.patience
        self.since = now if self.since is None else self.since
        if now - self.since > patience:
            problem = f"has not sampled for {patience:.0f} s ({failed.reason})"
            fix = "start it again, or raise `on_policy.patience`"
            raise ServerProblem(self.server.url, problem, fix)

    def pause(self) -> None:
        """Wait. Stopped."""
        until, self.seconds = time.monotonic() + self.seconds, min(2 * self.seconds, LONGEST_PAUSE)
        while time.monotonic() < until:
            if self.server.stopping():
                raise Stopped
            time.sleep(0.1)


def _seed_of(seed: int, nth: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {nth}".encode()).digest()[:7], "big")
