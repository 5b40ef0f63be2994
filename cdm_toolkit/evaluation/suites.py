"""Suites: what is scored and how, one YAML file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

import cdm_toolkit
from cdm_toolkit.errors import BadRunConfig, FileProblem, UnknownName
from cdm_toolkit.samples import SPLITS

# Imported when a suite names them, so that listing the suites stays light.
ADAPTERS = {
    "bpb": "cdm_toolkit.evaluation.bpb:BitsPerByte",
    "gsm8k": "cdm_toolkit.evaluation.gsm8k:Gsm8k",
}

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class DataSource:
    """Hold where a suite's rows are, tried in this order after a file that the caller gives."""

    file: str | None = None
    """A JSONL file, relative to the suite's."""
    sample: str | None = field(default=None, metadata={"one_of": SPLITS})
    """A split of the word problems in `cdm_toolkit.samples`."""
    hub: str | None = None
    """A data set id on the hub, with its `config` and `split`."""
    config: str | None = None
    split: str = "test"


@dataclass(frozen=True, slots=True)
class SuiteSpec:
    """Hold a suite file: its `settings` are the record that its adapter names."""

    name: str
    path: Path
    adapter: str
    summary: str
    data: DataSource
    settings: Any


def suites_folder() -> Path:
    """Find the suite files: inside the installed package, or at the top of a checkout."""
    package = Path(cdm_toolkit.__file__).parent
    installed = package / "eval_suites"
    return installed if installed.is_dir() else package.parent / "eval_suites"


def suite_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in suites_folder().glob("*.yaml")))


def load_suite(name: str) -> SuiteSpec:
    """Read a suite by its name or by the path of a YAML file.

    Raises UnknownName, FileProblem, or BadRunConfig with every fault of the file.
    """
    if name.endswith((".yaml", ".yml")):
        return read_suite(Path(name))
    if name not in suite_names():
        raise UnknownName("suite", name, suite_names())
    return read_suite(suites_folder() / f"{name}.yaml")


def adapter_class(name: str) -> Any:
    module, _, attribute = ADAPTERS[name].partition(":")
    return getattr(import_module(module), attribute)


def read_suite(path: Path) -> SuiteSpec:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileProblem(path, error.strerror or str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileProblem(path, "is not YAML: " + " ".join(str(error).split()), "mend the file") from error
    if not isinstance(content, dict):
        raise BadRunConfig(str(path), [f"holds {_kind(content)}: give a mapping with an adapter"])
    faults = _unknown_keys(content, ("adapter", "summary", "data", "settings"), "")
    adapter = content.get("adapter")
    if not isinstance(adapter, str) or adapter not in ADAPTERS:
        faults.append(f"adapter is {adapter!r}: give one of {', '.join(ADAPTERS)}")
    summary = content.get("summary", "")
    if not isinstance(summary, str):
        faults.append(f"summary is {summary!r}: give a line of text")
    data = _record(DataSource, content.get("data", {}), "data.", faults)
    settings = None
    if adapter in ADAPTERS:
        settings = _record(adapter_class(adapter).Settings, content.get("settings", {}), "settings.", faults)
    if faults:
        raise BadRunConfig(str(path), faults)
    assert data is not None
    return SuiteSpec(path.stem, path, str(adapter), summary, data, settings)


def _record(kind: type[Record], content: object, prefix: str, faults: list[str]) -> Record | None:
    """Make a frozen record of a mapping, or add what is wrong with it to the faults."""
    if not isinstance(content, Mapping):
        faults.append(f"{prefix[:-1]} is {_kind(content)}: give a mapping")
        return None
    found: list[str] = []
    types = get_type_hints(kind)
    names = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    found += _unknown_keys(content, names, prefix)
    values: dict[str, object] = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.name not in content:
            if entry.default is MISSING:
                found.append(f"{prefix}{entry.name} is missing")
            continue
        value, wanted = content[entry.name], _wanted(types[entry.name], entry.metadata)
        if not _fits(value, types[entry.name], entry.metadata):
            found.append(f"{prefix}{entry.name} is {value!r}: give {wanted}")
        values[entry.name] = tuple(value) if isinstance(value, list) else value
    faults += found
    return None if found else kind(**values)


def _unknown_keys(
    content: Mapping[Any, object], known: tuple[str, ...] | list[str], prefix: str
) -> list[str]:
    faults = []
    for key in content:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            faults.append(f"{prefix}{key} is not a setting: {hint}")
    return faults


def _fits(value: object, kind: Any, limits: Mapping[str, Any]) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(item, get_args(kind)[0]) for item in value)
    allowed = get_args(kind) or (kind,)
    if type(value) not in allowed:  # True is no int here
        return False
    if "one_of" in limits and value not in limits["one_of"]:
        return False
    return not ("at_least" in limits and isinstance(value, int) and value < limits["at_least"])


def _wanted(kind: Any, limits: Mapping[str, Any]) -> str:
    if "one_of" in limits:
        return "one of " + ", ".join(limits["one_of"])
    if "at_least" in limits:
        return f"a whole number of at least {limits['at_least']}"
    return "a list of texts" if get_origin(kind) is tuple else "a text"


def _kind(content: object) -> str:
    return "nothing" if content is None else repr(content)[:40]
