"""Suite files: what to score and how, in YAML."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field

from cdm_toolkit.artifacts.settings import Settings, make, read_yaml
from cdm_toolkit.artifacts.shipped import shipped_folder
from cdm_toolkit.errors import BadSettings, UnknownName

# Imported on use, so that listing the suites is fast.
ADAPTERS = {
    "bpb": "cdm_toolkit.evaluation.bpb:BitsPerByte",
    "code": "cdm_toolkit.evaluation.code:HumanEval",
    "instruct": "cdm_toolkit.evaluation.instruct:Instruct",
    "lm-eval": "cdm_toolkit.evaluation.lm_eval_suite:LmEval",
}
ALL = "all"
"""The name for all shipped suites whose data is available."""


class DataSource(Settings):
    """Sources of rows, tried in this order if the caller gives no file."""

    file: str | None = None
    """A JSONL file, relative to the suite file."""
    sample: Literal["train", "heldout", "prose", "languages"] | None = None
    """A text in `cdm_toolkit.samples`."""
    hub: str | None = None
    """A data set id on the hub, with its `config` and `split`."""
    config: str | None = None
    split: str = "test"
    hub_file: str | None = None
    """A JSONL file in the hub data set, instead of config and split."""


class _SuiteFile(Settings):
    """The contents of a suite file."""

    adapter: str = Field(min_length=1)
    """A short name, `module:Class`, or `path/to/file.py:Class` relative to the suite file."""
    summary: str = ""
    data: DataSource = DataSource()
    settings: Mapping[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SuiteSpec:
    """A parsed suite file; `settings` is an instance of the adapter's `Settings`."""

    name: str
    path: Path
    adapter: str
    summary: str
    data: DataSource
    settings: Any


def suite_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in shipped_folder("eval_suites").glob("*.yaml")))


def load_suite(name: str) -> SuiteSpec:
    """Read a suite by name, or from the path of a YAML file; its adapter is imported.

    Raises UnknownName, FileProblem, or BadSettings with every fault of the file.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in suite_names():
            raise UnknownName("suite", name, (*suite_names(), ALL))
        path = shipped_folder("eval_suites") / f"{name}.yaml"
    written = make(_SuiteFile, read_yaml(path), source=str(path))
    adapter = adapter_class(written.adapter, path)
    settings = make(adapter.Settings, written.settings, source=f"{path}, settings")
    return SuiteSpec(path.stem, path, written.adapter, written.summary, written.data, settings)


def adapter_class(name: str, suite: Path) -> Any:
    """Import an adapter: a class that implements `evaluate.Suite`, with a `Settings` class.

    Raises BadSettings where there is none of this name.
    """
    target = ADAPTERS.get(name, name)
    module_name, colon, attribute = target.rpartition(":")
    try:
        if not colon:
            raise ImportError(f"it is none of {', '.join(ADAPTERS)}")
        found = getattr(_module(module_name, suite.parent), attribute)
        if not issubclass(found.Settings, Settings):
            raise AttributeError(f"{attribute}.Settings is no record of cdm_toolkit.artifacts.settings")
    except Exception as error:  # a third-party module may raise anything while it is imported
        why = " ".join(str(error).split()) or type(error).__name__
        ways = "give its short name, module:Class, or file.py:Class beside the suite"
        raise BadSettings(str(suite), [f"adapter is {name!r}: {why}: {ways}"]) from error
    return found


def adapter_source(spec: SuiteSpec) -> str:
    """Return what identifies an adapter: its name, and the source code if it is a file next to the suite."""
    file = spec.adapter.rpartition(":")[0]
    if not file.endswith(".py"):
        return spec.adapter
    return f"{spec.adapter}\n{(spec.path.parent / file).read_text(encoding='utf-8')}"


def _module(name: str, folder: Path) -> ModuleType:
    """Import a module by its name, or from a file relative to a folder."""
    if not name.endswith(".py"):
        return import_module(name)
    path = (folder / name).resolve()
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    spec = spec_from_file_location(f"cdm_suite_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pydantic look their module up
    spec.loader.exec_module(module)
    return module
