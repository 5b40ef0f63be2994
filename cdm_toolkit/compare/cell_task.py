"""The task of a worker process: one cell of a study."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class CellTask:
    """The study file, the study's folder, the cell's name, and whether to keep its model."""

    study: str
    folder: str
    cell: str
    keep_models: bool

    def command(self) -> list[str]:
        """Write the command that starts a worker (`compare.worker`)."""
        return [sys.executable, "-m", "cdm_toolkit.compare.worker", json.dumps(asdict(self))]
