"""Settings from YAML and command-line assignments: frozen pydantic models; all faults are listed at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cdm_toolkit.errors import BadSettings, FileProblem

Record = TypeVar("Record", bound="Settings")

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def one_or_several(given: Any) -> Any:
    """Make a list of one name of it."""
    return (given,) if isinstance(given, str) else given


class Settings(BaseModel):
    """Base class of all settings: frozen, and unknown keys are faults."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file. Raises FileProblem, or BadSettings if it is not a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileProblem(path, error.strerror or str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileProblem(path, "is not YAML: " + " ".join(str(error).split()), "mend the file") from error
    if not isinstance(content, dict):
        raise BadSettings(str(path), [f"holds {_shown(content)}: give a mapping"])
    return content


def make(kind: type[Record], settings: Mapping[str, Any], *, source: str) -> Record:
    """Validate a mapping as settings of a class. Raises BadSettings with all faults: key, value, nearest known key.

    >>> class Run(Settings):
    ...     alpha: float = 0.5
    >>> make(Run, {"alhpa": 1}, source="run.yaml")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    cdm_toolkit.errors.BadSettings: run.yaml has a fault: alhpa is no setting, did you mean alpha?; mend it and run ...
    """
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        faults = list(
            dict.fromkeys(line for entry in error.errors(include_url=False) for line in _faults(kind, entry))
        )
        raise BadSettings(source, faults) from None


def with_settings(settings: Mapping[str, Any], assignments: Sequence[str], *, source: str) -> dict[str, Any]:
    """Apply assignments such as `train.lr=2e-5` or `teachers.0.top_k=50` to a copy of a mapping.

    A value is parsed as YAML. Raises BadSettings with every assignment whose key does not exist.

    >>> with_settings({"train": {"lr": 1.0}}, ["train.lr=2.5", "alpha=1"], source="--set")
    {'train': {'lr': 2.5}, 'alpha': 1}
    """
    result: dict[str, Any] = _copied(settings)
    faults = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            faults.append(f"{assignment!r} is no assignment: give KEY=VALUE")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            faults.append(f"{name} is {text!r}, which is not YAML: quote it")
            continue
        if problem := _put(result, name.split("."), value):
            faults.append(f"{name}: {problem}")
    if faults:
        raise BadSettings(source, faults)
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _put(into: Any, keys: Sequence[str], value: Any) -> str | None:
    """Set a value at a path of keys, creating mappings as needed; return the reason if that is impossible."""
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(into, list):
            if not key.isdigit() or int(key) >= len(into):
                return f"{'.'.join(keys[:depth])} has {len(into)} entries, counted from 0"
            index: Any = int(key)
        elif isinstance(into, dict):
            index = key
        else:
            return f"{'.'.join(keys[:depth])} is {_shown(into)}, which holds no settings"
        if last:
            into[index] = value
        elif isinstance(into, dict) and into.get(index) is None:
            into[index] = {}
        into = None if last else into[index]
    return None


def _faults(kind: type[Settings], entry: Any) -> list[str]:
    """Give a line for each fault: a validator may raise an error that has several `faults`, each with a `name`."""
    several = getattr(entry.get("ctx", {}).get("error"), "faults", None)
    if several is None:
        return [_fault(kind, entry)]
    where = "".join(f"{part}." for part in entry["loc"])
    return [f"{where}{fault}" for fault in several]


def _fault(kind: type[Settings], entry: Any) -> str:
    where = ".".join(str(part) for part in entry["loc"]) or "the whole"
    if entry["type"] == "extra_forbidden":
        known = list(_record_at(kind, entry["loc"][:-1]).model_fields)
        near = get_close_matches(str(entry["loc"][-1]), known, n=1)
        return f"{where} is no setting, " + (
            f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        )
    if entry["type"] == "missing":
        return f"{where} is missing"
    if entry["type"] == "value_error":
        reason = str(entry["ctx"]["error"])
        return f"{where}: {reason}" if entry["loc"] else reason
    got = f"{where} is {_shown(entry['input'])}"
    if entry["type"] == "literal_error":
        known = _choices(_record_at(kind, entry["loc"][:-1]), str(entry["loc"][-1]))
        near = get_close_matches(str(entry["input"]), known, n=1)
        return f"{got}: give one of {', '.join(known)}" + (f" (did you mean {near[0]}?)" if near else "")
    return f"{got}: give {_WANTED.get(entry['type'], _as_prose)(entry)}"


def _as_prose(entry: Any) -> str:
    message = str(entry["msg"])
    for opening in ("Input should be ", "Value should be "):
        message = message.removeprefix(opening)
    return message[:1].lower() + message[1:]


_WANTED: Mapping[str, Any] = {
    "greater_than_equal": lambda entry: f"a number of at least {entry['ctx']['ge']:g}",
    "greater_than": lambda entry: f"a number above {entry['ctx']['gt']:g}",
    "less_than_equal": lambda entry: f"a number of at most {entry['ctx']['le']:g}",
    "less_than": lambda entry: f"a number below {entry['ctx']['lt']:g}",
    "string_too_short": lambda entry: "a text that is not empty",
    "string_type": lambda entry: "a text",
    "finite_number": lambda entry: "a finite number",
    "int_type": lambda entry: "a whole number",
    "int_parsing": lambda entry: "a whole number",
    "int_from_float": lambda entry: "a whole number",
    "float_type": lambda entry: "a number",
    "float_parsing": lambda entry: "a number",
    "bool_type": lambda entry: "true or false",
    "bool_parsing": lambda entry: "true or false",
    "tuple_type": lambda entry: "a list",
    "model_type": lambda entry: "a mapping",
    "too_short": lambda entry: f"at least {entry['ctx']['min_length']} entries",
}


def _records_in(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for inner in get_args(annotation):
        yield from _records_in(inner)


def _record_at(kind: type[Settings], path: Sequence[str | int]) -> type[Settings]:
    """Find the settings class at a path of keys."""
    for key in path:
        if isinstance(key, str) and key in kind.model_fields:
            kind = next(_records_in(kind.model_fields[key].annotation), kind)
    return kind


def _choices(kind: type[Settings], name: str) -> list[str]:
    """List the values that a setting's Literal allows."""
    return [str(choice) for choice in _literals(kind.model_fields[name].annotation)]


def _literals(annotation: Any) -> Iterator[Any]:
    for inner in get_args(annotation):
        if get_args(inner):
            yield from _literals(inner)
        elif not isinstance(inner, type):
            yield inner


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]
