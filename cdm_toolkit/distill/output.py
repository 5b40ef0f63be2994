"""The output folder of a run: when it may be written, and what may be resumed."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from cdm_toolkit.errors import FileProblem, OutputExists

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
COMPLETE = "trainer_state.json"
"""The file that a checkpoint gets last."""


def last_checkpoint(output: Path) -> Path | None:
    """Find the latest checkpoint that was written to its end."""
    found = [
        (int(match[1]), path)
        for path in (output.iterdir() if output.is_dir() else ())
        if (match := CHECKPOINT.fullmatch(path.name)) and (path / COMPLETE).is_file()
    ]
    return max(found)[1] if found else None


def claim_output(output: Path, *, overwrite: bool, resume: bool) -> Path | None:
    """See that a run may write to `output`, and make it; gives the checkpoint to resume from.

    Raises OutputExists where it is not empty and neither is set, FileProblem where it cannot be written or
    there is nothing to resume. Nothing is removed here.
    """
    checkpoint = last_checkpoint(output)
    if resume:
        if checkpoint is None:
            raise FileProblem(
                output, "it has no whole checkpoint to resume from", "start the run without --resume"
            )
        return checkpoint
    try:
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise OutputExists(output, can_resume=checkpoint is not None)
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except FileExistsError:
        raise FileProblem(output, "it is a file", "name a folder") from None
    except OSError as error:
        fix = "choose a folder that you may write to, with room"
        raise FileProblem(output, f"it cannot be written ({error.strerror})", fix) from None
    return None


def remove_run(output: Path) -> None:
    """Remove the checkpoints of an earlier run; what else it wrote is replaced when the new one ends."""
    for path in output.glob("checkpoint-*"):
        shutil.rmtree(path)
