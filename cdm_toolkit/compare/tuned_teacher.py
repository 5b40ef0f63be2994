"""A study's teacher that is itself fine-tuned on the rows before it teaches (teacher correction, arXiv 2408.11796)."""

from __future__ import annotations

from pathlib import Path

from cdm_toolkit.compare.study import StudyConfig
from cdm_toolkit.distill.settings import DistillConfig, from_mapping

TEACHER_FOLDER = "teacher"


def tuned(study: StudyConfig, train: Path, folder: Path) -> StudyConfig:
    """Name the trained teacher in place of the study's own; train it first where it is not there yet.

    As all cells it reads the rows in `train` for the study's steps; of its own are the settings `teacher_run`. A study
    without these stays as it is. Raises as `distill.run.run`.
    """
    if study.teacher_run is None:
        return study
    if not (folder / "config.json").is_file():
        from cdm_toolkit.distill.run import run

        run(_config(study, train, folder), overwrite=True)
    return study.model_copy(update={"teacher": str(folder)})


def _config(study: StudyConfig, train: Path, folder: Path) -> DistillConfig:
    assert study.teacher_run is not None
    own = study.teacher_run.model_dump(exclude_unset=True)
    settings = {
        "student": study.teacher,
        "data": {"path": str(train), "max_length": study.max_length},
        "output": str(folder),
        "train": own | {"max_steps": study.steps, "save_every": 0, "group_by_length": False},
    }
    return from_mapping(settings, source="the teacher's training")
