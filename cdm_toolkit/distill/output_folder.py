"""The output folder of a run: when it may be written, and what may be resumed."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from cdm_toolkit.artifacts.manifest import FileSum, Format, sums_of, write_json
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.errors import FileProblem, OutputExists

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SAMPLES = "samples.jsonl"
"""Samples of the steps that were logged, in the output folder of a run with `on_policy`."""
WEIGHTS = "weights-for-vllm-"
"""Beginning of the name of a folder with the weights of a student, for a server that samples."""
SEAL = "checksums.json"
"""The file that a checkpoint gets last: size and sha256 of each of its files."""
TRAINED_BY = ("batching.py", "forward.py", "tokdiff", "alignment", "vocab_map", "kd", "teachers", "distill")
"""Sources that training depends on."""
FORMAT = Format(
    "cdm-toolkit checkpoint", 2, "start the run without `resume`", older=(1,), unmarked=1, code=TRAINED_BY
)
"""Of version 1 were the sha256 of each file, by its name, and nothing else."""


def seal_checkpoint(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files, which makes it whole."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    write_json(checkpoint / SEAL, FORMAT.header(provenance(), files=sums_of(checkpoint, files)))


def check_seal(checkpoint: Path, fix: str = "") -> None:
    """See that each file of a checkpoint is as it was written. Raises BadArtifact with the first that is not."""
    fix = fix or f"remove {checkpoint} and resume from the one before, or start the run without `resume`"
    found = FORMAT.read(checkpoint / SEAL, fix)
    try:
        sums = {name: FileSum(**file) for name, file in found["files"].items()}
    except KeyError:  # version 1
        sums = {name: FileSum(None, sha256) for name, sha256 in found.items()}
    for name, file in sums.items():
        file.check(checkpoint / name, fix)


def last_checkpoint(output: Path) -> Path | None:
    """Find the latest checkpoint that was written to its end."""
    found = [
        (int(match[1]), path)
        for path in (output.iterdir() if output.is_dir() else ())
        if (match := CHECKPOINT.fullmatch(path.name)) and (path / SEAL).is_file()
    ]
    return max(found)[1] if found else None


def claim_output(output: Path, *, overwrite: bool, resume: bool) -> Path | None:
    """See that a run may write to `output`, and make it; gives the checkpoint to resume from.

    Raises OutputExists where it is not empty and neither is set, FileProblem where it cannot be written or
    there is nothing to resume, BadArtifact for a checkpoint that is damaged. Nothing is removed here.
    """
    checkpoint = last_checkpoint(output)
    if resume:
        if checkpoint is None:
            raise FileProblem(
                output, "it has no whole checkpoint to resume from", "start the run without `resume`"
            )
        check_seal(checkpoint)
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
    """Remove the checkpoints and samples of an earlier run; what else it wrote is replaced when the new one ends."""
    for path in (*output.glob("checkpoint-*"), *output.glob(f"{WEIGHTS}*")):
        shutil.rmtree(path)
    (output / SAMPLES).unlink(missing_ok=True)
