"""The process that runs the test: the program is a function to it whose answers come out of another process.

The test, its helpers and the verdict's token are here alone. An answer is decoded to exactly the plain types, so
that no method of the program ever runs here; an answer that ends the matter is judged before the test sees it, so
that no `except` of the test can take it for a success.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from cdm_toolkit.evaluation.sandbox import plain

LONGEST_TEXT = 300
TEST = "<test>"
# What can be made of a text alone.
RAISED = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, UnicodeError | ExceptionGroup)
}


class Judge:
    """Says the verdict, once, and ends the process."""

    def __init__(self, token: str, descriptor: int) -> None:
        self._token, self._descriptor = token, descriptor

    def say(self, reason: str, detail: str = "") -> NoReturn:
        verdict = {"token": self._token, "reason": reason, "detail": detail[:LONGEST_TEXT]}
        os.write(self._descriptor, json.dumps(verdict).encode())
        os._exit(0)


class Candidate:
    """Stands for the program's function in the test."""

    def __init__(self, judge: Judge, calls: int, answers: int, longest: int) -> None:
        self._judge, self._longest = judge, longest
        # They are open as long as the process is.
        self._calls = open(calls, "w", encoding="ascii", closefd=False)  # noqa: SIM115
        self._answers = open(answers, "rb", closefd=False)  # noqa: SIM115
        self.called = False

    def __call__(self, *arguments: object, **named: object) -> Any:
        self.called = True
        try:
            self._calls.write(plain.encode((arguments, named)) + "\n")
            self._calls.flush()
        except plain.NotPlainError as error:
            self._judge.say("unchecked", f"the test calls it with what is no plain value: {error}")
        except BrokenPipeError:
            self._judge.say("ended")
        answer = self.receive()
        if type(answer.get("raised")) is str:
            self._raise(answer["raised"], str(answer.get("text")))
        if type(answer.get("value")) is not str:
            self._judge.say("not plain", str(answer.get("not_plain", "it is no answer")))
        try:
            return plain.decode(answer["value"])
        except plain.NotPlainError as error:
            self._judge.say("not plain", str(error))

    def _raise(self, kind: str, text: str) -> NoReturn:
        if kind not in RAISED:  # such as SystemExit: no test asks for it, and a bare `except` would take it
            self._judge.say("raised", text)
        raise RAISED[kind](text.partition(": ")[2])

    def receive(self) -> dict[str, Any]:
        line = self._answers.readline(self._longest)
        if not line:
            self._judge.say("ended")
        if not line.endswith(b"\n") and len(line) >= self._longest:
            self._judge.say("not plain", f"its answer is longer than {self._longest} bytes")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if type(answer) is not dict:
            self._judge.say("not plain", "it wrote something else than an answer to the test")
        return answer


def check(work: Mapping[str, Any], answers: int, calls: int, verdict: int) -> None:
    """Run the test and say the verdict, whatever happens."""
    judge = Judge(work["token"], verdict)
    candidate = Candidate(judge, calls, answers, work["longest"])
    first = candidate.receive()
    if not first.get("loaded"):
        judge.say("unloadable", str(first.get("unloadable")))
    random.seed(0)  # some tests draw their cases
    names: dict[str, Any] = {"__name__": "test"}
    try:
        exec(compile(work["helpers"], "<helpers>", "exec"), names)
        names |= {"candidate": candidate, work["entry_point"]: candidate}
        exec(compile(work["test"], TEST, "exec"), names)
        if "check" in names:
            names["check"](candidate)
    except AssertionError as error:
        judge.say("failed", _where(error, work["test"]))
    except BaseException as error:
        judge.say("raised" if candidate.called else "unchecked", _where(error, work["test"]))
    if not candidate.called:
        judge.say("unchecked", "the test never called it")
    judge.say("passed")


def _where(error: BaseException, test: str) -> str:
    """Say what was raised, and by which line of the test."""
    frames = traceback.extract_tb(error.__traceback__)
    number = next((frame.lineno for frame in reversed(frames) if frame.filename == TEST), None)
    line = "" if number is None else f" at {test.splitlines()[number - 1].strip()}"
    text = " ".join(str(error).split())
    return type(error).__name__ + (f": {text[:100]}" if text else "") + line
