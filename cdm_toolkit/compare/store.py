"""The output folder of a study: whose it is, what lies where, cells as they are written and read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from cdm_toolkit.artifacts.atomic import atomic_write
from cdm_toolkit.artifacts.settings import make, read_yaml
from cdm_toolkit.compare.record import Cell, CellResult, Measured, ModelScores, Point, StudyResult
from cdm_toolkit.compare.study import OF_ALL, StudyConfig
from cdm_toolkit.errors import BadArtifact, FileProblem

STUDY_FILE, RESULTS_FILE, PAGE_FILE, CELL_FILE, LOG_FILE = (
    "study.yaml",
    "results.json",
    "report.html",
    "cell.json",
    "log.txt",
)
FORMAT, VERSION = "cdm-toolkit study cell", 1
SAID = ("about", "default")
"""Settings of what is said of the cells."""
FREE = (*SAID, "methods", "seeds", "alpha", "curves")
"""Settings that may change once cells are there: those, and which cells there are. A cell itself tells how it was
trained."""
DIFFERENCES = 4
"""How many are named before the rest is counted."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """A finished cell, and how it was made."""

    result: CellResult
    machine: str
    warnings: tuple[str, ...]
    receipt: Mapping[str, Any]

    @property
    def fingerprints(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.receipt["fingerprints"]
        return found

    @property
    def options(self) -> Mapping[str, Any]:
        """Give those of the method, as an entry of a study resolves to; none for supervised fine-tuning."""
        teachers: Sequence[Mapping[str, Any]] = self.result.settings.get("teachers", ())
        return {name: value for teacher in teachers for name, value in teacher.items() if name not in OF_ALL}


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Where a study is written."""

    path: Path

    @property
    def study_file(self) -> Path:
        return self.path / STUDY_FILE

    @property
    def shared(self) -> Path:
        return self.path / "shared"

    def of(self, cell: Cell) -> Path:
        """Name the folder of a cell."""
        return self.path / "cells" / cell.name

    # Whose it is

    def claim(self, study: StudyConfig, *, overwrite: bool = False) -> None:
        """Make the folder this study's, or see that it is; `overwrite` removes what another one has left.

        Raises BadArtifact where it is another study's, FileProblem where it has something else or cannot be written.
        """
        with only_one(self.path, "opens this folder"):
            if overwrite and self.study_file.is_file():
                self._clear()
                self._write_study(study)
            elif not self.study_file.is_file():
                if any(not file.name.startswith(".") for file in self.path.iterdir()):
                    problem = "it is not empty, and holds no study"
                    raise FileProblem(self.path, problem, "give another --output")
                self._write_study(study)
            elif (there := self.read_study()) != study:
                self.check(study)
                if there.model_copy(update=_said(study)) != study:
                    self._check_idle()  # its processes know the cells by their numbers
                self._write_study(study)

    def check(self, study: StudyConfig) -> None:
        """See that the folder is this study's, if it is one's; changes nothing. Raises BadArtifact, FileProblem."""
        if self.study_file.is_file() and (differences := _differences(self.read_study(), study)):
            problem = f"it holds another study: {differences}"
            fix = "give another --output, or --overwrite without --cell to start anew"
            raise BadArtifact(self.path, problem, fix)

    def _write_study(self, study: StudyConfig) -> None:
        content = study.model_dump(mode="json", exclude_unset=True)
        with atomic_write(self.study_file) as stream:
            stream.write(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())

    def read_study(self) -> StudyConfig:
        """Read the study whose folder it is. Raises FileProblem, BadRunConfig."""
        return make(StudyConfig, read_yaml(self.study_file), source=str(self.study_file))

    def _check_idle(self) -> None:
        for place in (self.shared, *sorted(self.path.glob("cells/*"))):
            if is_held(place):
                problem = f"another process is at work in {place.relative_to(self.path)}"
                raise BadArtifact(self.path, problem, "end that first, or give another --output")

    def _clear(self) -> None:
        """Remove what a study has written. BadArtifact while some process is at work there."""
        self._check_idle()
        for folder in (self.path / "cells", self.shared):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.path / RESULTS_FILE, self.path / PAGE_FILE, *self.path.glob("*.png")):
            file.unlink(missing_ok=True)
        self.study_file.unlink(missing_ok=True)

    # Cells

    def read_cell(self, study: StudyConfig, cell: Cell) -> Stored | None:
        """Read a cell; None where it is not finished.

        Raises BadArtifact where its file is damaged, or has a run of that name with other options.
        """
        file = self.of(cell) / CELL_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_bytes())
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise ValueError("it is of another format")
            result = _cell_result(content["result"])
            found = Stored(result, content["machine"], tuple(content["warnings"]), content["receipt"])
            was = found.options
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"it is damaged ({str(error) or type(error).__name__})"
            raise BadArtifact(file, problem, f"run it again: --cell {cell.index} --overwrite") from None
        again = f"run it again: --cell {cell.index} --overwrite"
        if found.result.cell.name != cell.name:
            raise BadArtifact(file, f"it has the cell {found.result.cell.name}", again)
        if differences := _counted(_differing(was, study.methods[cell.method].resolved()[0])):
            problem = f"it was trained with other options: {differences}"
            raise BadArtifact(file, problem, f"give the method another name, or {again}")
        return replace(found, result=replace(found.result, cell=cell))

    def write_cell(self, stored: Stored) -> None:
        """Write a cell, whole or not at all."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "result": asdict(stored.result),
            "machine": stored.machine,
            "warnings": list(stored.warnings),
            "receipt": dict(stored.receipt),
        }
        write_json(self.of(stored.result.cell) / CELL_FILE, content)

    def write_results(self, result: StudyResult) -> Path:
        """Write all that was measured."""
        file = self.path / RESULTS_FILE
        write_json(file, asdict(result))
        return file


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    with atomic_write(file) as stream:
        stream.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


# Records from JSON


def model_scores(content: Mapping[str, Any]) -> ModelScores:
    """Make scores of what JSON has of them."""
    return ModelScores(_measured(content["inside"]), _measured(content["outside"]), content["suites"])


def _measured(content: Mapping[str, Any]) -> dict[str, Measured]:
    return {kind: Measured(**fields) for kind, fields in content.items()}


def _cell_result(content: Mapping[str, Any]) -> CellResult:
    parts = {
        "cell": Cell(**content["cell"]),
        "scores": model_scores(content["scores"]),
        "curve": tuple(Point(**point) for point in content["curve"]),
    }
    return CellResult(**{**content, **parts})


# Two studies


def _said(study: StudyConfig) -> dict[str, Any]:
    return {name: getattr(study, name) for name in SAID}


def _differences(there: StudyConfig, now: StudyConfig) -> str:
    """Say in which settings two studies are not the same; nothing where their cells can be compared."""
    old, new = (study.model_dump(mode="json", exclude=set(FREE)) for study in (there, now))
    return _counted(_differing(old, new))


def _counted(differences: Iterable[str]) -> str:
    """Name the first differences and count the others."""
    every = list(differences)
    more = f" and {len(every) - DIFFERENCES} more" if len(every) > DIFFERENCES else ""
    return "; ".join(every[:DIFFERENCES]) + more


def _differing(there: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*there, *now)):
            inner = f"{name}.{key}" if name else str(key)
            if key not in now or key not in there:
                yield f"{inner} is only {'there' if key in there else 'now'}"
            else:
                yield from _differing(there[key], now[key], inner)
    elif there != now:
        yield f"{name} is {_shown(there)} there and {_shown(now)} now"


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


# One process at a time

LOCK = ".lock"


@contextmanager
def only_one(folder: Path, waiting: str, say: Say = lambda _: None) -> Iterator[None]:
    """Let one process at a time into a block; another waits for it, and says what for.

    The lock goes with the process that holds it, however that ends. FileProblem where the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process that {waiting}")
            lock.acquire()
    except OSError as error:
        fix = "name a place in a folder that you may write to"
        raise FileProblem(folder, f"it cannot be written ({error.strerror or error})", fix) from None
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Say whether a process is in the block of `only_one` for this folder."""
    if not (folder / LOCK).is_file():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
