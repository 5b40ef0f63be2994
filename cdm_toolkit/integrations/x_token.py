"""The projection file of X-Token: what NeMo-RL's `projection_matrix_path` names.

`kd.XToken` reads such files itself (`kd.projection_file`), as `kd` imports nothing above it; here they are written.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cdm_toolkit.errors import FileProblem
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.projection_file import read_projection
from cdm_toolkit.vocab_map.projection import Projection

__all__ = ["read_projection", "write_projection"]


def write_projection(path: str | Path, pair: TokenizerPair, projection: Projection | None = None) -> None:
    """Write W of a pair for NeMo-RL: `indices` and `likelihoods`, [vocab_s, width].

    `projection` is `pair.projection()` unless given. The file also has the names and fingerprints of both
    tokenizers; NeMo-RL passes over them, `read_projection` checks them. FileProblem where it cannot be written.
    """
    found = pair.projection() if projection is None else projection
    content = {
        "indices": torch.from_numpy(found.ids).long(),
        "likelihoods": torch.from_numpy(found.weights),
        "student_model_id": pair.name_s,
        "teacher_model_id": pair.name_t,
        "student_fingerprint": pair.fingerprints[1],
        "teacher_fingerprint": pair.fingerprints[0],
        "enable_scale_trick": False,
    }
    try:
        with Path(path).open("wb") as file:
            torch.save(content, file)
    except OSError as error:
        raise FileProblem(path, f"it cannot be written: {error.strerror}") from None
