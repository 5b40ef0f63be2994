"""Entry of the processes that `runner.run_study` starts: `python -m cdm_toolkit.compare.worker FOLDER CELL [keep]`.

They read the study as JSON from standard input: its file may grow while they run. `keep` keeps the cell's model. A
failure is one line at the end of standard error, with exit status 2.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from cdm_toolkit.errors import CdmError


def main() -> int:
    """Run the cell that the command line names; gives the exit status."""
    gc.set_threshold(50_000, 50, 1000)  # imports make half a million objects, none of them garbage
    from cdm_toolkit.compare.runner import run_cell
    from cdm_toolkit.compare.study import StudyConfig
    from cdm_toolkit.compare.study_folder import StudyFolder

    folder, cell, *keep = sys.argv[1:]
    try:
        study = StudyConfig.model_validate(json.load(sys.stdin))
        run_cell(study, StudyFolder(Path(folder)), cell, keep_models=bool(keep), say=_say)
    except (CdmError, OSError) as error:
        _say(str(error))
        return 2
    return 0


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    sys.exit(main())
