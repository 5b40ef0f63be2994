"""The process that runs the test. The program is a proxy function; its results come from another process.

Only this process has the test, its helpers and the token of the verdict. Results are decoded to exactly the plain
types, so no method of the program's objects runs here. A result that decides the outcome is reported before the test
receives it, so that no `except` in the test can turn it into a success.
"""

from __future__ import annotations

import builtins
import json
import os
import random
from collections.abc import Mapping
from typing import Any, NoReturn

from cdm_toolkit.evaluation.sandbox import plain

LONGEST_TEXT = 300
TEST = "<test>"
# Exceptions that can be constructed from a message alone.
RAISED = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, UnicodeError | ExceptionGroup)
}


class VerdictWriter:
    """Writes the verdict, once, and ends the process."""

    def __init__(self, token: str, descriptor: int) -> None:
        self._token, self._descriptor = token, descriptor

    def report(self, reason: str, detail: str = "") -> NoReturn:
        verdict = {"token": self._token, "reason": reason, "detail": detail[:LONGEST_TEXT]}
        os.write(self._descriptor, json.dumps(verdict).encode())
        os._exit(0)


class Candidate:
    """Proxy of the program's function in the test."""

    def __init__(self, writer: VerdictWriter, calls: int, answers: int, longest: int) -> None:
        self._verdict, self._longest = writer, longest
        # Open for the lifetime of the process.
        self._calls = open(calls, "w", encoding="ascii", closefd=False)  # noqa: SIM115
        self._answers = open(answers, "rb", closefd=False)  # noqa: SIM115
        self.called = False

    def __call__(self, *arguments: object, **named: object) -> Any:
        self.called = True
        try:
            self._calls.write(plain.encode((arguments, named)) + "\n")
            self._calls.flush()
        except plain.NotPlainError as error:
            self._verdict.report("unchecked", f"the test calls it with what is no plain value: {error}")
        except BrokenPipeError:
            self._verdict.report("ended")
        answer = self.receive()
        if type(answer.get("raised")) is str:
            self._raise(answer["raised"], str(answer.get("text")))
        if type(answer.get("value")) is not str:
            self._verdict.report("not plain", str(answer.get("not_plain", "it is no answer")))
        try:
            return plain.decode(answer["value"])
        except plain.NotPlainError as error:
            self._verdict.report("not plain", str(error))

    def _raise(self, kind: str, text: str) -> NoReturn:
        if kind not in RAISED:  # such as SystemExit: no test expects it, and a bare `except` would catch it
            self._verdict.report("raised", text)
        raise RAISED[kind](text.partition(": ")[2])

    def receive(self) -> dict[str, Any]:
        line = self._answers.readline(self._longest)
        if not line:
            self._verdict.report("ended")
        if not line.endswith(b"\n") and len(line) >= self._longest:
            self._verdict.report("not plain", f"its answer is longer than {self._longest} bytes")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if type(answer) is not dict:
            self._verdict.report("not plain", "it wrote something else than an answer to the test")
        return answer


def check(work: Mapping[str, Any], answers: int, calls: int, verdict: int) -> None:
    """Run the test and write the verdict, whatever happens."""
    writer = VerdictWriter(work["token"], verdict)
    candidate = Candidate(writer, calls, answers, work["longest"])
    first = candidate.receive()
    if not first.get("loaded"):
        writer.report("unloadable", str(first.get("unloadable")))
    random.seed(0)  # some tests use random inputs
    names: dict[str, Any] = {"__name__": "test"}
    try:
        exec(compile(work["helpers"], "<helpers>", "exec"), names)
        names |= {"candidate": candidate, work["entry_point"]: candidate}
        exec(compile(work["test"], TEST, "exec"), names)
        if "check" in names:
            names["check"](candidate)
    except AssertionError as error:
        writer.report("failed", _where(error, work["test"]))
    except BaseException as error:
        writer.report("raised" if candidate.called else "unchecked", _where(error, work["test"]))
    if not candidate.called:
        writer.report("unchecked", "the test never called it")
    writer.report("passed")


def _where(error: BaseException, test: str) -> str:
    """Describe an exception, with the line of the test that raised it."""
    import traceback  # slow to import, and most tests raise nothing

    frames = traceback.extract_tb(error.__traceback__)
    number = next((frame.lineno for frame in reversed(frames) if frame.filename == TEST), None)
    line = "" if number is None else f" at {test.splitlines()[number - 1].strip()}"
    text = " ".join(str(error).split())
    return type(error).__name__ + (f": {text[:100]}" if text else "") + line
