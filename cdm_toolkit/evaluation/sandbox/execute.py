"""Run programs inside, several at once, and judge what became of each.

Two processes a program, each behind walls of its own: one runs the program, one its test. The verdict comes from the
second over a pipe that the first has never had, with a token that it has never seen.
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

import cdm_toolkit
from cdm_toolkit.errors import IsolationMissing
from cdm_toolkit.evaluation.sandbox.records import Isolation, Limits, Outcome, Program, Reason

NOBODY = 65534
PACKAGE = Path(cdm_toolkit.__file__).parent
PARENTS = (
    ("cdm_toolkit", "."),
    ("cdm_toolkit.evaluation", "evaluation"),
    ("cdm_toolkit.evaluation.sandbox", "evaluation/sandbox"),
)
SETUP_SECONDS = 60.0  # until the walls stand; on a busy machine, too
END_SECONDS = 10.0
LONGEST_VERDICT = 65536
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All that a process inside knows of the environment, until it forgets this too."""
# The package as it is, without what it imports for other purposes.
START = f"""
import sys
for name, folder in {[(name, str(PACKAGE / path)) for name, path in PARENTS]}:
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [folder]
from {PARENTS[-1][0]}.inside import main
main()
"""


class SetupError(Exception):
    """Says why the walls could not be built."""


def run_programs(
    programs: Sequence[Program],
    *,
    isolation: Isolation,
    limits: Limits = Limits(),
    workers: int = 1,
    preload: Sequence[str] = (),
) -> Iterator[tuple[int, Outcome]]:
    """Run programs, `workers` at once, and give each one's place and outcome as soon as it is known.

    `preload` names modules besides the standard library that programs and tests may import. Raises
    IsolationMissing where the walls that `isolation` names cannot be built.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="sandbox") as pool:
        places = {
            pool.submit(run_program, program, isolation=isolation, limits=limits, preload=preload): place
            for place, program in enumerate(programs)
        }
        try:
            for done in as_completed(places):
                yield places[done], done.result()
        except SetupError as error:
            raise IsolationMissing("walls that it had before", str(error)) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_program(
    program: Program, *, isolation: Isolation, limits: Limits = Limits(), preload: Sequence[str] = ()
) -> Outcome:
    """Run one program and its test. Raises SetupError where the walls that `isolation` names cannot be built."""
    token = secrets.token_hex(16)
    job: dict[str, Any] = {
        "layers": isolation.layers,
        "limits": limits.model_dump(),
        "preload": list(preload),
    }
    job["path"] = sys.path if preload else []
    with ExitStack() as stack:
        calls_out, calls_in, answers_out, answers_in, verdict_out, verdict_in = (
            stack.enter_context(os.fdopen(end, mode, buffering=0))
            for _ in range(3)
            for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
        )
        asked = {"entry_point": program.entry_point}
        worker = stack.enter_context(
            _Cell(
                {**job, "role": "worker", "work": {**asked, "source": program.source}}, calls_out, answers_in
            )
        )
        test = {"test": program.test, "helpers": program.helpers, "token": token}
        longest = limits.answer_mib * 2**20
        checker = stack.enter_context(
            _Cell(
                {**job, "role": "checker", "work": {**asked, **test, "longest": longest}},
                answers_out,
                calls_in,
                verdict_in,
            )
        )
        for end in (calls_out, calls_in, answers_out, answers_in, verdict_in):
            end.close()
        worker.wait_for_walls()
        checker.wait_for_walls()
        began = time.monotonic()
        said = _read(verdict_out.fileno(), began + limits.wall_seconds)
        seconds = time.monotonic() - began
        ends = [cell.end() for cell in (worker, checker)]
    return _judge(said, token, ends[0], ends[1], limits, seconds)


@dataclass(frozen=True, slots=True)
class _End:
    """How a process ended, as `waitpid` says, and the processor time that it took."""

    status: int
    cpu_seconds: float

    def __str__(self) -> str:
        code = os.waitstatus_to_exitcode(self.status)
        return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


class _Cell:
    """One process behind walls, with the process that built them and waits for its end."""

    def __init__(self, job: Mapping[str, Any], *ends: Any) -> None:
        descriptors = [end.fileno() for end in ends]
        self._mapped = "user" in job["layers"]
        self._scratch = None if "mount" in job["layers"] else _scratch_folder()
        self._child: int | None = None
        self._end = _End(signal.SIGKILL, 0.0)
        self._process = subprocess.Popen(
            # -P and -S: nothing but the standard library can be imported
            [sys.executable, "-s", "-S", "-P", "-B", "-c", START],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            cwd="/",
            env=ENVIRONMENT,
        )
        whole = {
            **job,
            "descriptors": descriptors,
            "scratch": self._scratch,
            "mountpoint": tempfile.gettempdir(),
        }
        self._tell(json.dumps(whole))

    def __enter__(self) -> _Cell:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait_for_walls(self) -> None:
        """Wait until the work begins. Raises SetupError."""
        report = self._report(SETUP_SECONDS)
        if report.get("unshared") and self._mapped:
            _map_users(self._process.pid)
            self._tell("mapped")
            report = self._report(SETUP_SECONDS)
        if "child" not in report:
            raise SetupError(str(report.get("problem", "the process that builds the walls ended")))
        self._child = int(report["child"])

    def end(self) -> _End:
        """End the process, if it has not ended, and whatever it started."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.closed:
            return self._end
        process.stdin.close()
        report = self._report(END_SECONDS)
        if "status" in report:
            self._end = _End(report["status"], report["cpu_seconds"])
        else:
            self._kill()
        process.wait()
        process.stdout.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return self._end

    def _kill(self) -> None:
        """End a process that does not answer, from outside."""
        self._process.kill()
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)

    def _tell(self, line: str) -> None:
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
    """Tell a new user namespace its users: nobody, and root where we are root, until the walls stand."""
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
    """Read to the end, the end of a line or the deadline; a verdict or report is short."""
    said = b""
    while (left := deadline - time.monotonic()) > 0 and len(said) < LONGEST_VERDICT:
        poll = select.poll()  # select cannot look at descriptors above 1023
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(left * 1000):
            break
        piece = os.read(descriptor, 1 if to_line else 4096)
        said += piece
        if not piece or (to_line and piece == b"\n"):
            break
    return said


def _judge(said: bytes, token: str, worker: _End, checker: _End, limits: Limits, seconds: float) -> Outcome:
    try:
        verdict = json.loads(said)
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
        return Outcome("ended", f"its process ended before it answered ({worker})", seconds)
    return Outcome(reason, detail, seconds)
