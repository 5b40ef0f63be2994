"""Processes that are forked from one that has torch, the Trainer and `datasets` loaded: five seconds less for each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # as `main` sets them
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
}
"""What libraries read as they are loaded."""
PRELOADED = [
    *("torch", "transformers.trainer", "transformers.models.auto.modeling_auto", "datasets", "numba"),
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2"),
    "cdm_toolkit.distill.trainer",
]


@dataclass(slots=True)
class Started:
    """A process, and the files of its output."""

    process: ForkServerProcess
    out: Path
    err: Path

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end. TimeoutError."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"no end within {timeout} s, on stderr: {self.err.read_text()}")
        return self.process.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end, and give what was written to stdout and stderr. TimeoutError."""
        self.wait(timeout)
        return self.out.read_text(encoding="utf-8"), self.err.read_text(encoding="utf-8")


def serve() -> ForkServerContext:
    """See that the process is there that others are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, SETTINGS):
        forkserver.ensure_running()
    return context


def start(
    command: Sequence[object],
    out: Path,
    err: Path,
    environment: Mapping[str, str],
    *,
    given: Connection | None = None,
    own_session: bool = False,
) -> Started:
    """Run a module with arguments, as `python -m` does, in this folder and with its output in two files.

    It reads `given` as its standard input. A process that was started here may start others.
    """
    context = serve()
    out.touch()
    err.touch()
    words, variables = list(map(str, command)), dict(environment) | SETTINGS
    settings = (_server._forkserver_address, words, str(Path.cwd()), str(out), str(err), variables)
    process = context.Process(target=_run, args=(*settings, given, own_session))
    process.start()
    return Started(process, out, err)


_server: Any = forkserver._forkserver  # type: ignore[attr-defined]


def _run(
    server: str,
    command: list[str],
    folder: str,
    out: str,
    err: str,
    environment: dict[str, str],
    given: Connection | None,
    own_session: bool,
) -> None:
    _server._forkserver_address, _server.ensure_running = server, lambda: None
    forkserver.ensure_running = _server.ensure_running
    if own_session:
        os.setsid()
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    if given is not None:
        os.dup2(given.fileno(), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # it was closed  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    module, *sys.argv[1:] = command
    runpy.run_module(module, run_name="__main__", alter_sys=True)
