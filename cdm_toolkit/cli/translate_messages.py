"""Translate messages of the library for the terminal: settings to options, functions to commands.

The library quotes Python in backticks: a setting (`max_length`), one with its value (`aligner="dtw"`), or the
function that mends something, bare (`write_cache`) or as a call that can be copied.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

COMMANDS = {
    "align_text": "align show",
    "build_neighbours": "vocab-map build",
    "export_map": "vocab-map export",
    "list_aliases": "models list",
    "write_cache": "teacher cache",
}
"""What does in a terminal what a function does in Python."""

_QUOTED = re.compile(r"`([a-z_][^`]*)`")
# Typer carries click inside or beside it, by version: a command has no type that both know.
_root: ContextVar[Any] = ContextVar("root", default=None)
_running: ContextVar[Any] = ContextVar("running", default=None)


def start(root: Any, words: Sequence[str]) -> None:
    """Note the command that a command line runs: its options are those that messages name from here on.

    `root` is the command `cdm` with its groups.
    """
    _root.set(root)
    _running.set(_find_command(words))


def in_terminal(message: str) -> str:
    """Put a message of the library into the words of the command that runs. What has none loses its backticks."""
    return _QUOTED.sub(lambda found: _translated(found[1]), message)


def _find_command(words: Sequence[str]) -> Any:
    """Follow words down from `cdm`, up to the first that is no command's name."""
    command = _root.get()
    for word in words:
        if word not in getattr(command, "commands", ()):
            break
        command = command.commands[word]
    return command


def _translated(python: str) -> str:
    try:
        quoted = ast.parse(f"_({python})", mode="eval").body
    except SyntaxError:
        return f"`{python}`"  # nothing that the library quotes, but a piece of a user's text
    match quoted:
        case ast.Call(args=[ast.Name() | ast.Attribute() as name], keywords=[]):
            return _command_line(name) or _setting(python)
        case ast.Call(args=[ast.Call() as call], keywords=[]):
            return _command_line(call.func, call) or python
        case ast.Call(args=[], keywords=[ast.keyword(arg=str(name), value=value)]):
            return " ".join(_option_words(_running.get(), name, value)) or python
        case _:
            return f"`{python}`"


def _setting(name: str) -> str:
    """Name the option that sets this, the key of a run file's setting, or the bare name."""
    command = _running.get()
    if option := _option(command, name):
        return option
    return f"--set {name}=…" if "." in name and _option(command, "assignments") == "--set" else name


def _option(command: Any, name: str) -> str | None:
    for parameter in getattr(command, "params", ()):
        if parameter.name == name and parameter.opts[0].startswith("-"):
            return str(max(parameter.opts, key=len))
    return None


def _command_line(function: ast.expr, call: ast.Call | None = None) -> str | None:
    """Write the command that does what a function does, with the arguments of a call as its options."""
    words = COMMANDS.get(ast.unparse(function).rpartition(".")[2])
    if words is None:
        return None
    command = _find_command(words.split())
    options = [_option_words(command, *argument) for argument in _arguments(command, call)] if call else []
    return " ".join(["cdm", words, *(word for option in options for word in option)])


def _arguments(command: Any, call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """List a call's arguments by option. A positional one is made of one text: `load_view('llama3')`."""
    for parameter, given in zip(getattr(command, "params", ()), call.args, strict=False):
        match given:
            case ast.Call(args=[text], keywords=[]):
                yield parameter.name, text
            case ast.Call(keywords=keywords):  # a record of settings
                yield from ((str(keyword.arg), keyword.value) for keyword in keywords)


def _option_words(command: Any, name: str, value: ast.expr) -> list[str]:
    option = _option(command, name)
    if option is None or (isinstance(value, ast.Constant) and value.value is False):
        return []
    if isinstance(value, ast.Constant):
        return [option] if value.value is True else [option, shlex.quote(str(value.value))]
    return [option, shlex.quote(ast.unparse(value))]
