"""The process that runs the program: it loads the source, then answers calls of the function that the test names.

Nothing here is a wall: the program may do what it likes with this process. Whatever it writes to the test is read
as a plain value.
"""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from cdm_toolkit.evaluation.sandbox import plain

LONGEST_TEXT = 300


def serve(work: Mapping[str, Any], calls: int, answers: int, verdict: int) -> None:
    """Load the program and answer calls until there are no more."""
    with (
        open(answers, "w", encoding="ascii", closefd=False) as sink,
        open(calls, "rb", closefd=False) as source,
    ):
        module = ModuleType("program")  # in sys.modules, as dataclasses and typing look names up there
        sys.modules["program"] = module
        try:
            exec(compile(work["source"], "<program>", "exec"), vars(module))
        except BaseException as error:
            sink.write(_line(unloadable=_told(error)))
            return
        function = vars(module).get(work["entry_point"])
        if function is None:
            sink.write(_line(unloadable=f"it defines no {work['entry_point']}"))
            return
        sink.write(_line(loaded=True))
        sink.flush()
        for line in source:
            sink.write(_answer(function, line))
            sink.flush()


def _answer(function: Any, line: bytes) -> str:
    """Call the function, and encode what it answers or what becomes of the attempt as a line."""
    arguments, named = plain.decode(line)
    try:
        value = function(*arguments, **named)
    except BaseException as error:
        return _line(raised=_kind(error), text=_told(error))
    try:
        return _line(value=plain.encode(value))
    except plain.NotPlainError as error:
        return _line(not_plain=str(error))
    except BaseException as error:
        return _line(not_plain=_told(error))


def _kind(error: BaseException) -> str:
    """Name the nearest class of an exception that the test knows as well."""
    known = (kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    return next(known, "BaseException")


def _told(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = "it cannot be shown"
    return f"{type(error).__name__}: {text}"[:LONGEST_TEXT]


def _line(**answer: object) -> str:
    return json.dumps(answer) + "\n"
