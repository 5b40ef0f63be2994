"""Run programs in the sandbox, several in parallel, and return their outcomes.

Each program takes two separately isolated processes: one runs the program, one its test. The verdict comes from the
second, over a pipe that the first never has, with a token that the first never knows.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cdm_toolkit.errors import IsolationMissing
from cdm_toolkit.evaluation.sandbox.records import Isolation, Limits, Outcome, Program, Reason

NOBODY = 65534
HERE = __name__.rpartition(".")[0]
PARENTS = {HERE.rsplit(".", up)[0]: str(Path(__file__).parents[up]) for up in range(3)}
"""The folders of the package of the sandbox and of those above it, by name."""
SETUP_SECONDS = 60.0  # to set up the isolation, even on a busy machine
END_SECONDS = 10.0
LONGEST_VERDICT = 65536
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
"""The environment of a sandbox process, which it clears after setup."""
# Import the sandbox modules without running the __init__ of their parent packages. Their bytecode is kept, because they
# are imported for each program; that of what is imported later is not.
START = f"""
import sys
for name, folder in {PARENTS}.items():
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [folder]
from {HERE}.inside import main
sys.dont_write_bytecode = True
main()
"""


class SetupError(Exception):
    """Raised with the reason where the isolation could not be set up."""


def run_programs(
    programs: Sequence[Program],
    *,
    isolation: Isolation,
    limits: Limits = Limits(),
    workers: int = 1,
    preload: Sequence[str] = (),
) -> Iterator[tuple[int, Outcome]]:
    """Run programs, `workers` in parallel; yield the index and outcome of each as soon as it has finished.

    `preload` names modules besides the standard library that programs and tests may import. Raises IsolationMissing
    where the layers of `isolation` cannot be set up.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="sandbox") as pool:
        indices = {
            pool.submit(run_program, program, isolation=isolation, limits=limits, preload=preload): index
            for index, program in enumerate(programs)
        }
        try:
            for done in as_completed(indices):
                yield indices[done], done.result()
        except SetupError as error:
            raise IsolationMissing("isolation layers that it had before", str(error)) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_program(
    program: Program, *, isolation: Isolation, limits: Limits = Limits(), preload: Sequence[str] = ()
) -> Outcome:
    """Run one program and its test. Raises SetupError where the layers of `isolation` cannot be set up."""
    token = secrets.token_hex(16)
    job = {
        "layers": isolation.layers,
        "limits": limits.model_dump(),
        "preload": list(preload),
        "path": sys.path if preload else [],
    }
    entry, longest = {"entry_point": program.entry_point}, limits.answer_mib * 2**20
    test = {"test": program.test, "helpers": program.helpers, "token": token, "longest": longest}
    with ExitStack() as stack:
        calls_out, calls_in, answers_out, answers_in, verdict_out, verdict_in = (
            stack.enter_context(os.fdopen(end, mode, buffering=0))
            for _ in range(3)
            for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
        )
        work = {"role": "worker", "work": {**entry, "source": program.source}}
        worker = _SandboxProcess({**job, **work}, calls_out, answers_in)
        stack.callback(worker.end)
        work = {"role": "checker", "work": {**entry, **test}}
        checker = _SandboxProcess({**job, **work}, answers_out, calls_in, verdict_in)
        stack.callback(checker.end)
        for end in (calls_out, calls_in, answers_out, answers_in, verdict_in):
            end.close()
        worker.wait_until_isolated()
        checker.wait_until_isolated()
        began = time.monotonic()
        verdict = _read(verdict_out.fileno(), began + limits.wall_seconds)
        seconds = time.monotonic() - began
        ends = [process.end() for process in (worker, checker)]
    return _outcome(verdict, token, ends[0], ends[1], limits, seconds)


@dataclass(frozen=True, slots=True)
class _End:
    """How a process ended: its wait status, its processor time, and whether its group ran out of memory."""

    status: int
    cpu_seconds: float
    out_of_memory: bool = False

    def __str__(self) -> str:
        code = os.waitstatus_to_exitcode(self.status)
        return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


class _SandboxProcess:
    """One isolated process, with the process that set up its isolation and waits for it."""

    def __init__(self, job: Mapping[str, Any], *ends: Any) -> None:
        descriptors = [end.fileno() for end in ends]
        self._mapped = "user" in job["layers"]
        self._scratch = None if "mount" in job["layers"] else _scratch_folder()
        self._child: int | None = None
        self._end = _End(signal.SIGKILL, 0.0)
        self._process = subprocess.Popen(
            # -P and -S: only the standard library can be imported
            [sys.executable, "-s", "-S", "-P", "-c", START],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            cwd="/",
            env=ENVIRONMENT,
            start_new_session=True,  # a signal to our process group does not keep it from clearing up after us
        )
        places = {"scratch": self._scratch, "mountpoint": tempfile.gettempdir()}
        self._send(json.dumps({**job, **places, "descriptors": descriptors}))

    def wait_until_isolated(self) -> None:
        """Wait until the isolation is set up and the work begins. Raises SetupError."""
        report = self._report(SETUP_SECONDS)
        if report.get("unshared") and self._mapped:
            _map_users(self._process.pid)
            self._send("mapped")
            report = self._report(SETUP_SECONDS)
        if "child" not in report:
            raise SetupError(str(report.get("problem", "the process that sets up the isolation ended")))
        self._child = int(report["child"])

    def end(self) -> _End:
        """Terminate the process, if it still runs, and all that it started."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.closed:
            return self._end
        process.stdin.close()
        report = self._report(END_SECONDS)
        if "status" in report:
            self._end = _End(report["status"], report["cpu_seconds"], report["killed"] > 0)
        else:  # it does not respond
            process.kill()
            if self._child is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._child, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return self._end

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line.encode() + b"\n")

    def _report(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        line = _read(self._process.stdout.fileno(), deadline, to_line=True)
        report: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        return report


def _map_users(pid: int) -> None:
    """Map users into a new user namespace: nobody, and root during setup if we are root."""
    folder = Path(f"/proc/{pid}")
    try:
        if os.geteuid() == 0:
            users = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
            (folder / "uid_map").write_text(users)
            (folder / "gid_map").write_text(users)
        else:
            (folder / "uid_map").write_text(f"{NOBODY} {os.geteuid()} 1\n")
            (folder / "setgroups").write_text("deny")
            (folder / "gid_map").write_text(f"{NOBODY} {os.getegid()} 1\n")
    except OSError as error:
        raise SetupError(f"{error.filename}: {error.strerror}") from None


def _scratch_folder() -> str:
    folder = tempfile.mkdtemp(prefix="cdm-sandbox-")
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    return folder


def _read(descriptor: int, deadline: float, *, to_line: bool = False) -> bytes:
    """Read up to the end of file or line, the deadline, or LONGEST_VERDICT bytes."""
    content = b""
    while (left := deadline - time.monotonic()) > 0 and len(content) < LONGEST_VERDICT:
        poll = select.poll()  # select does not support descriptors above 1023
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(left * 1000):
            break
        piece = os.read(descriptor, 1 if to_line else 4096)
        content += piece
        if not piece or (to_line and piece == b"\n"):
            break
    return content


def _outcome(
    content: bytes, token: str, worker: _End, checker: _End, limits: Limits, seconds: float
) -> Outcome:
    try:
        verdict = json.loads(content)
        reason, detail = verdict["reason"], str(verdict["detail"])
        genuine = secrets.compare_digest(str(verdict["token"]), token) and reason in get_args(Reason)
    except (ValueError, KeyError, TypeError):
        genuine = False
    spent = f"{limits.cpu_seconds} s of processor time"
    if not genuine:
        if seconds >= limits.wall_seconds:
            return Outcome("timeout", f"it took longer than {limits.wall_seconds:g} s", seconds)
        return Outcome("unchecked", f"its test ended without a verdict ({checker})", seconds)
    if reason == "ended":
        if worker.cpu_seconds >= limits.cpu_seconds - 0.1:
            return Outcome("cpu", f"it took longer than {spent}", seconds)
        if worker.out_of_memory:
            together = limits.memory_mib + limits.scratch_mib
            return Outcome("ended", f"its processes took more than {together} MiB together", seconds)
        return Outcome("ended", f"its process ended before it answered ({worker})", seconds)
    return Outcome(reason, detail, seconds)
