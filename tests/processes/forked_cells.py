"""`cdm`, and the processes of its cells forked as it is: `preloaded` starts this module."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, BinaryIO, cast

import preloaded


class Forked(preloaded.Started):
    """What the runner of a study has of a `subprocess.Popen`."""

    stdin: IO[bytes]

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


def start(words: Sequence[str], *, env: Mapping[str, str], stdout: BinaryIO, **_: Any) -> Forked:
    """Start what the runner would start by a `python -m`, with its output in one file."""
    python, flag, *command = words
    assert (python, flag) == (sys.executable, "-m")
    reader, writer = multiprocessing.Pipe(duplex=False)
    log = Path(cast("str", stdout.name))
    started = preloaded.start(command, log, log, env, given=reader, own_session=True)
    reader.close()
    forked = Forked(started.process, log, log)
    forked.stdin = os.fdopen(os.dup(writer.fileno()), "wb")
    writer.close()
    return forked


def module() -> Any:
    """Give what stands for `subprocess` in the runner."""
    return SimpleNamespace(Popen=start, PIPE=subprocess.PIPE)


if __name__ == "__main__":
    from cdm_toolkit.cli import entry
    from cdm_toolkit.compare import runner

    runner.subprocess = module()
    entry()
