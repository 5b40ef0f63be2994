"""The process that runs the program: it loads the source, then serves calls of its entry point from the test.

Nothing here is a security boundary: the program has full control of this process. All that it writes to the test is
decoded as plain values.
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
    """Load the program and serve calls until there are no more."""
    with (
        open(answers, "w", encoding="ascii", closefd=False) as sink,
        open(calls, "rb", closefd=False) as source,
    ):
        module = ModuleType("program")  # in sys.modules, because dataclasses and typing look up names there
        sys.modules["program"] = module
        try:
            exec(compile(work["source"], "<program>", "exec"), vars(module))
        except BaseException as error:
            sink.write(_line(unloadable=_message(error)))
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
    """Call the function; encode its result or exception as a line."""
    arguments, named = plain.decode(line)
    try:
        value = function(*arguments, **named)
    except BaseException as error:
        return _line(raised=_builtin_class(error), text=_message(error))
    try:
        return _line(value=plain.encode(value))
    except plain.NotPlainError as error:
        return _line(not_plain=str(error))
    except BaseException as error:
        return _line(not_plain=_message(error))


def _builtin_class(error: BaseException) -> str:
    """Return the nearest built-in class of an exception."""
    known = (kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    return next(known, "BaseException")


def _message(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = "it cannot be shown"
    return f"{type(error).__name__}: {text}"[:LONGEST_TEXT]


def _line(**answer: object) -> str:
    return json.dumps(answer) + "\n"
