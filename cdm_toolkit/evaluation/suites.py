"""Suites: what is scored and how, one YAML file each."""

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
from cdm_toolkit.errors import BadRunConfig, UnknownName

# Imported when a suite names them, so that listing the suites stays light.
ADAPTERS = {
    "bpb": "cdm_toolkit.evaluation.bpb:BitsPerByte",
    "code": "cdm_toolkit.evaluation.code:HumanEval",
    "instruct": "cdm_toolkit.evaluation.instruct:Instruct",
    "lm-eval": "cdm_toolkit.evaluation.lm_eval_suite:LmEval",
}
ALL = "all"
"""Stands for every shipped suite that has data within reach."""


class DataSource(Settings):
    """Where rows are, tried in this order after a file that the caller gives."""

    file: str | None = None
    """A JSONL file, relative to the suite's."""
    sample: Literal["train", "heldout"] | None = None
    """A split of the word problems in `cdm_toolkit.samples`."""
    hub: str | None = None
    """A data set id on the hub, with its `config` and `split`."""
    config: str | None = None
    split: str = "test"
    hub_file: str | None = None
    """The one JSONL file of the hub's data set that is meant, instead of a config and split."""


class PaperFigures(Settings):
    """Figures of a publication to compare with: rows of the table beside the models that are scored."""

    source: str = Field(min_length=1)
    """Where they were published, such as `Zhang et al. 2024, table 1`."""
    figures: Mapping[str, Mapping[str, float]]
    """Value by metric, as the suite names it, by the name of the row."""


class _SuiteFile(Settings):
    """A suite file as it is written."""

    adapter: str = Field(min_length=1)
    """A short name, `module:Class`, or `path/to/file.py:Class` relative to the suite file."""
    summary: str = ""
    data: DataSource = DataSource()
    paper: PaperFigures | None = None
    settings: Mapping[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SuiteSpec:
    """Hold a suite file: its `settings` are the record that its adapter names."""

    name: str
    path: Path
    adapter: str
    summary: str
    data: DataSource
    settings: Any
    paper: PaperFigures | None = None


def suite_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in shipped_folder("eval_suites").glob("*.yaml")))


def load_suite(name: str) -> SuiteSpec:
    """Read a suite by its name or by the path of a YAML file.

    Raises UnknownName, FileProblem, or BadRunConfig with every fault of the file.
    """
    if name.endswith((".yaml", ".yml")):
        return read_suite(Path(name))
    if name not in suite_names():
        raise UnknownName("suite", name, (*suite_names(), ALL))
    return read_suite(shipped_folder("eval_suites") / f"{name}.yaml")


def read_suite(path: Path) -> SuiteSpec:
    """Read a suite file; its adapter is imported. Raises as `load_suite`."""
    written = make(_SuiteFile, read_yaml(path), source=str(path))
    settings = make(
        adapter_class(written.adapter, path).Settings, written.settings, source=f"{path}, settings"
    )
    return SuiteSpec(path.stem, path, written.adapter, written.summary, written.data, settings, written.paper)


def adapter_class(name: str, suite: Path) -> Any:
    """Import an adapter: a class with the protocol `run.Suite`, whose `Settings` is a record of settings.

    Raises BadRunConfig where there is none of this name.
    """
    target = ADAPTERS.get(name, name)
    module_name, colon, attribute = target.rpartition(":")
    try:
        if not colon:
            raise ImportError(f"it is none of {', '.join(ADAPTERS)}")
        found = getattr(_module(module_name, suite.parent), attribute)
        if not issubclass(found.Settings, Settings):
            raise AttributeError(f"{attribute}.Settings is no record of cdm_toolkit.artifacts.settings")
    except Exception as error:  # whatever a module that is not ours raises while it is imported
        why = " ".join(str(error).split()) or type(error).__name__
        ways = "give its short name, module:Class, or file.py:Class beside the suite"
        raise BadRunConfig(str(suite), [f"adapter is {name!r}: {why}: {ways}"]) from error
    return found


def adapter_source(spec: SuiteSpec) -> str:
    """Give what tells an adapter from another: its name, and the code of one that is a file beside the suite."""
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
