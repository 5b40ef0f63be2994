"""Entry of the processes that `runner.run_study` starts: one cell each, `python -m cdm_toolkit.compare.worker TASK`.

TASK is JSON: the study file, the study's folder, the cell's name, and whether to keep its model. A failure is one line
at the end of standard error, with exit status 2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cdm_toolkit.compare.cell_task import CellTask
from cdm_toolkit.errors import CdmError

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
}
"""Progress bars and advice of other libraries would mix with the log; what is set already stays."""


def run_task(task: CellTask) -> None:
    """Run the cell. Raises as `run_cell`."""
    from cdm_toolkit.compare.runner import run_cell
    from cdm_toolkit.compare.study import from_file
    from cdm_toolkit.compare.study_folder import StudyFolder

    study, folder = from_file(task.study), StudyFolder(Path(task.folder))
    run_cell(study, folder, task.cell, keep_models=task.keep_models, say=_say)


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")


def main() -> int:
    """Run the task on the command line; gives the exit status."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        run_task(CellTask(**json.loads(sys.argv[1])))
    except (CdmError, OSError) as error:
        _say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
