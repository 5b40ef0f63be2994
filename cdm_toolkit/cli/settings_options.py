"""Options of the command line that are settings: their help and defaults are those of the settings' fields.

They are read from the sources of the settings, whose import brings torch (seconds).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

Names = Callable[[], list[tuple[str, str]]]
PACKAGE = Path(__file__).parents[1]
RUN = "distill/settings.py"
RECORDS_OF_A_RUN: Mapping[str, tuple[str, str]] = {
    "": (RUN, "DistillConfig"),
    "data": (RUN, "DataConfig"),
    "teachers.0": ("distill/teacher_settings.py", "TeacherConfig"),
    "train": (RUN, "TrainConfig"),
    "train.lora": (RUN, "LoraConfig"),
    "eval": (RUN, "EvalConfig"),
}
"""Which record stands where in a run file, and the source that has it."""


@dataclass(frozen=True, slots=True)
class SettingField:
    """What the source says of a field; `default` as it is written, None where that is nothing or off."""

    help: str
    default: str | None


def run_option(setting: str, panel: str, *flags: str, names: Names | None = None) -> Any:
    """Make the option of a run's setting, such as `train.lr`; its flag is the last part of it unless given.

    `names` are what the shell completes.
    """
    where, _, name = setting.rpartition(".")
    return _option(fields_of(*RECORDS_OF_A_RUN[where])[name], flags, panel, names)


def record_option(source: str, record: str, name: str, *flags: str, names: Names | None = None) -> Any:
    """Make the option of a field of one record, in a source file of the package; `names` as `run_option`."""
    return _option(fields_of(source, record)[name], flags, None, names)


def given(context: typer.Context, source: str, record: str) -> dict[str, Any]:
    """Give the fields of a record that have an option in the command that runs, where a value was given."""
    return {
        name: value for name in fields_of(source, record) if (value := context.params.get(name)) is not None
    }


def _option(field: SettingField, flags: tuple[str, ...], panel: str | None, names: Names | None) -> Any:
    return typer.Option(
        *flags,
        help=field.help,
        rich_help_panel=panel,
        show_default=field.default or False,
        autocompletion=names,
    )


def setting_named(flag: str) -> str | None:
    """Find the run's setting that a flag such as `--save-every` would be of; None where there is none."""
    name = flag.lstrip("-").replace("-", "_")
    for where, record in RECORDS_OF_A_RUN.items():
        if name in fields_of(*record):
            return f"{where}.{name}" if where else name
    if any(name in fields for file in (PACKAGE / "kd").glob("*.py") for fields in _settings_in(file)):
        return f"teachers.0.{name}"
    return None


@cache
def fields_of(source: str, record: str) -> Mapping[str, SettingField]:
    """Read the fields of a class from its source, those of its bases there first: the string below one is its help."""
    tree = _parsed(PACKAGE / source)
    constants = dict(constants_in(tree.body))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    sources = dict.fromkeys(classes, source) | dict(_imported(tree))
    bases = [base.id for base in classes[record].bases if isinstance(base, ast.Name)]
    known = [(sources[base], base) for base in bases if base in sources and base != "Settings"]
    inherited = [field for base in known for field in fields_of(*base).items()]
    return dict(inherited) | dict(_fields(classes[record], constants))


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Give the names that a module imports from another of the package, with that one's source."""
    package = f"{PACKAGE.name}."
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package):
            source = str(node.module).removeprefix(package).replace(".", "/") + ".py"
            yield from ((alias.name, source) for alias in node.names)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _settings_in(file: Path) -> Iterator[set[str]]:
    """Give the names of the fields of each class of settings in a file."""
    for node in _parsed(file).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Settings"):
            yield {each.target.id for each in _declared(node)}


def constants_in(body: Iterable[ast.stmt]) -> Iterator[tuple[str, Any]]:
    """Give the names of a module or class that are assigned a constant, with their values."""
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value.value


def _declared(record: ast.ClassDef) -> Iterator[Any]:
    for node in record.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node


def _fields(record: ast.ClassDef, constants: Mapping[str, Any]) -> Iterator[tuple[str, SettingField]]:
    below = dict(zip(record.body, record.body[1:], strict=False))
    for node in _declared(record):
        match below.get(node):
            case ast.Expr(value=ast.Constant(value=str(text))):
                help = " ".join(text.replace("`", "").split())
            case _:
                help = ""
        yield node.target.id, SettingField(help, _default(node.value, constants))


def _default(value: ast.expr | None, constants: Mapping[str, Any]) -> str | None:
    match value:
        case ast.Name(id=name):
            return str(constants[name]) if name in constants else None
        case ast.Constant(value=None | False) | ast.Tuple(elts=[]) | None:
            return None
        case ast.Constant(value=True):
            return "on"
        case _:
            return ast.unparse(value).strip("'\"")
