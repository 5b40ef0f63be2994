"""The output folder of a study: its layout, which study it belongs to, and reading and writing of cells."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml

from cdm_toolkit.artifacts.atomic import atomic_write
from cdm_toolkit.artifacts.lock import is_locked, locked
from cdm_toolkit.artifacts.manifest import Format, differences, write_json
from cdm_toolkit.artifacts.settings import make, read_yaml
from cdm_toolkit.compare.study import StudyConfig
from cdm_toolkit.compare.types import (
    RINGS,
    Cell,
    CellResult,
    Continuation,
    Measured,
    ModelScores,
    Point,
)
from cdm_toolkit.errors import BadArtifact, FileProblem

STUDY_FILE, SHARED_FILE, RESULTS_FILE, PAGE_FILE, CELL_FILE, LOG_FILE = (
    "study.yaml",
    "shared.json",
    "results.json",
    "report.html",
    "cell.json",
    "log.txt",
)
FORMAT = Format("cdm-toolkit study cell", 3, "run it again with `overwrite`", older=(2,))
"""Version 2 has neither words, digits, continuations nor text near the domain: its cells are read without these."""
FREE = ("name", "about", "default", "methods", "seeds", "alpha", "curves")
"""Settings that may change once cells are there: what is said of them, and which there are. A cell itself tells how
it was trained."""
DIFFERENCES = 4
"""How many are named before the rest is counted."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """A finished cell, and how it was made."""

    result: CellResult
    options: Mapping[str, Any]
    """Those of its method, defaults included."""
    machine: str
    warnings: tuple[str, ...]
    provenance: Mapping[str, Any]

    @property
    def fingerprints(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.provenance["fingerprints"]
        return found


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
                    raise FileProblem(self.path, problem, "give another `output`")
                self._write_study(study)
            elif self._has_made_nothing() and _differences(self.read_study(), study):
                self._clear()
                self._write_study(study)
            else:
                self.check(study)
                if self.study_file.read_bytes() != _as_yaml(study):
                    self._write_study(study)

    def check(self, study: StudyConfig) -> None:
        """See that the folder is this study's, if one has made something there. Raises BadArtifact, FileProblem."""
        if not self._has_made_nothing():
            self.check_file(study)

    def check_file(self, study: StudyConfig) -> None:
        """See that no other study has taken the folder. Raises BadArtifact, FileProblem."""
        if self.study_file.is_file() and (differences := _differences(self.read_study(), study)):
            problem = f"it holds another study: {differences}"
            fix = "give another `output`, or `overwrite` without `cell` to start anew"
            raise BadArtifact(self.path, problem, fix)

    def _write_study(self, study: StudyConfig) -> None:
        with atomic_write(self.study_file) as stream:
            stream.write(_as_yaml(study))

    @contextmanager
    def kept(self, study: StudyConfig) -> Iterator[Path]:
        """Give a file of the study as it is now: the one in the folder may grow while this study runs."""
        with NamedTemporaryFile("wb", prefix=".study-", suffix=".yaml", dir=self.path) as stream:
            stream.write(_as_yaml(study))
            stream.flush()
            yield Path(stream.name)

    def read_study(self) -> StudyConfig:
        """Read the study whose folder it is. Raises FileProblem, BadSettings."""
        return make(StudyConfig, read_yaml(self.study_file), source=str(self.study_file))

    def _has_made_nothing(self) -> bool:
        """Say whether a study could not even begin here: it may be put right, and need not start elsewhere."""
        made = (self.shared / SHARED_FILE, *self.path.glob(f"cells/*/{CELL_FILE}"))
        return not any(file.is_file() for file in made)

    def _clear(self) -> None:
        """Remove what a study has written. BadArtifact while some process is at work there."""
        for part in (self.shared, *sorted(self.path.glob("cells/*"))):
            if is_held(part):
                problem = f"another process is at work in {part.relative_to(self.path)}"
                raise BadArtifact(self.path, problem, "end that first, or give another `output`")
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
        again = f"run it again with `cell={cell.index}` and `overwrite`"
        try:
            content = FORMAT.read(file, again)
            result = _cell_result(content["result"])
            warnings, options = tuple(content["warnings"]), dict(content["options"])
            found = Stored(result, options, content["machine"], warnings, content["provenance"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"it is damaged ({str(error) or type(error).__name__})"
            raise BadArtifact(file, problem, again) from None
        if found.result.cell.name != cell.name:
            raise BadArtifact(file, f"it has the cell {found.result.cell.name}", again)
        if differing := _counted(differences(options, study.methods[cell.method].options())):
            problem = f"it was trained with other options: {differing}"
            raise BadArtifact(file, problem, f"give the method another name, or {again}")
        return replace(found, result=replace(found.result, cell=cell))

    def read_cells(self, study: StudyConfig, cells: Iterable[Cell]) -> dict[Cell, Stored]:
        """Read those of the cells that are finished. Raises one BadArtifact for all that cannot be used."""
        found, faults = dict[Cell, Stored](), list[BadArtifact]()
        for cell in cells:
            try:
                if (stored := self.read_cell(study, cell)) is not None:
                    found[cell] = stored
            except BadArtifact as fault:
                faults.append(fault)
        if len(faults) > 1:
            problem = f"{len(faults)} cells cannot be used; the first: {faults[0].what}"
            raise BadArtifact(self.path, problem, f"see all with `list_cells`, {faults[0].fix}")
        if faults:
            raise faults[0]
        return found

    def write_cell(self, stored: Stored) -> None:
        """Write a cell, whole or not at all."""
        content = FORMAT.header(
            stored.provenance,
            result=asdict(stored.result),
            options=dict(stored.options),
            machine=stored.machine,
            warnings=list(stored.warnings),
        )
        write_json(self.of(stored.result.cell) / CELL_FILE, content)

    def write_results(self, record: Mapping[str, Any]) -> Path:
        """Write all that was measured and what it says: `summary.results_record`."""
        file = self.path / RESULTS_FILE
        write_json(file, record)
        return file


# Records from JSON


def model_scores(content: Mapping[str, Any]) -> ModelScores:
    """Make scores of what JSON has of them."""
    parts = {name: _measured(content.get(name, {})) for name in (*RINGS, "select_alpha_on")}
    texts = {
        kind: tuple(Continuation(**text) for text in of_kind)
        for kind, of_kind in content.get("continuations", {}).items()
    }
    return ModelScores(**parts, suites=content["suites"], continuations=texts)


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


def _as_yaml(study: StudyConfig) -> bytes:
    content = study.model_dump(mode="json", exclude_unset=True)
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text.encode()


def _differences(there: StudyConfig, now: StudyConfig) -> str:
    """Say in which settings two studies are not the same; nothing where their cells can be compared."""
    old, new = (study.model_dump(mode="json", exclude=set(FREE)) for study in (there, now))
    return _counted(differences(old, new))


def _counted(differences: Iterable[str]) -> str:
    """Name the first differences and count the others."""
    every = list(differences)
    more = f" and {len(every) - DIFFERENCES} more" if len(every) > DIFFERENCES else ""
    return "; ".join(every[:DIFFERENCES]) + more


# One process at a time

LOCK = ".lock"


@contextmanager
def only_one(folder: Path, waiting: str, say: Say = lambda _: None) -> Iterator[None]:
    """Let one process at a time into a block; another waits for it, and says what for.

    The lock goes with the process that holds it, however that ends. FileProblem where the folder cannot be written.
    """
    with locked(folder / LOCK, lambda: say(f"waiting for another process that {waiting}")):
        yield


def is_held(folder: Path) -> bool:
    """Say whether a process is in the block of `only_one` for this folder."""
    return is_locked(folder / LOCK)
