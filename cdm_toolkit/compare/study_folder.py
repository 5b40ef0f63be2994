"""The output folder of a study: its layout, which study it belongs to, and reading and writing of cells."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cdm_toolkit.artifacts.atomic import write_whole
from cdm_toolkit.artifacts.lock import is_locked, locked
from cdm_toolkit.artifacts.manifest import Format, differences, validated, write_json
from cdm_toolkit.artifacts.settings import make, read_yaml
from cdm_toolkit.compare.study import StudyConfig
from cdm_toolkit.compare.types import Cell, CellResult
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
            is_new = not self.study_file.is_file()
            if is_new and any(not file.name.startswith(".") for file in self.path.iterdir()):
                raise FileProblem(self.path, "it is not empty, and holds no study", "give another `output`")
            if not is_new and (overwrite or (self._has_made_nothing() and self._differs_from(study))):
                self._clear()
            self.check(study)
            content = study.model_dump(mode="json", exclude_unset=True)
            write_whole(
                self.study_file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()
            )

    def check(self, study: StudyConfig) -> None:
        """See that the folder is this study's, if one has made something there. Raises BadArtifact, FileProblem."""
        if not self._has_made_nothing():
            self.check_file(study)

    def check_file(self, study: StudyConfig) -> None:
        """See that no other study has taken the folder. Raises BadArtifact, FileProblem."""
        if differing := self._differs_from(study):
            fix = "give another `output`, or `overwrite` without `cell` to start anew"
            raise BadArtifact(self.path, f"it holds another study: {differing}", fix)

    def _differs_from(self, study: StudyConfig) -> str:
        """Say in which settings the study that is here is another one; nothing where their cells can be compared."""
        if not self.study_file.is_file():
            return ""
        there, now = (each.model_dump(mode="json", exclude=set(FREE)) for each in (self.read_study(), study))
        return _named(differences(there, now))

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
        found = validated(Stored, file, FORMAT.read(file, again), again)
        if found.result.cell.name != cell.name:
            raise BadArtifact(file, f"it has the cell {found.result.cell.name}", again)
        entry = study.methods[cell.method]
        # an option that a version before did not have was then what its default is
        if differing := _named(differences(entry.default_options() | dict(found.options), entry.options())):
            problem = f"it was trained with other options: {differing}"
            raise BadArtifact(file, problem, f"give the method another name, or {again}")
        if (steps := found.result.steps) != (wanted := study.steps_of(cell.method)):
            problem = f"it was trained for {steps:,} steps, not for {wanted:,}"
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
        content = asdict(stored)
        made_by = content.pop("provenance")
        write_json(self.of(stored.result.cell) / CELL_FILE, FORMAT.header(made_by, **content))

    def write_results(self, record: Mapping[str, Any]) -> Path:
        """Write all that was measured and what it says: `summary.results_record`."""
        file = self.path / RESULTS_FILE
        write_json(file, record)
        return file


def _named(differences: Iterable[str]) -> str:
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
