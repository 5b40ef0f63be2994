"""Read a projection of X-Token from the file that NeMo-RL's tools write."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_toolkit.errors import BadArtifact, FileProblem, TokenizerMismatch
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.vocab_map.projection import Projection
from cdm_toolkit.vocab_map.types import NO_MATCH

BUILD_AGAIN = "give the file that was built for this teacher and this student"


def read_projection(path: str | Path, pair: TokenizerPair) -> Projection:
    """Read W of a pair: `indices` and `likelihoods`, one row for each student id, as NeMo-RL's tools write them.

    Nothing in the file is run (`weights_only`). Rows beyond the student's ids belong to padding of its embedding,
    and are left out. FileProblem where it cannot be read, BadArtifact where it is no projection or does not fit
    the vocabularies, TokenizerMismatch where it names tokenizers (as our files do) that are others.
    """
    content = _load(Path(path))
    _check_tokenizers(path, content, pair)
    ids, weights = _tables(path, content)
    ids, weights = ids.long(), weights.to(torch.float32)
    if len(ids) < pair.vocab_s:
        raise BadArtifact(path, f"it has {len(ids)} rows, the student {pair.vocab_s} ids", BUILD_AGAIN)
    ids, weights = ids.narrow(0, 0, pair.vocab_s), weights.narrow(0, 0, pair.vocab_s)
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise BadArtifact(path, "not all of its weights are numbers of at least 0", "build it again")
    ids = ids.masked_fill(weights == 0, NO_MATCH)
    if ids.numel() and int(ids.max()) >= pair.vocab_t:
        problem = f"it names the teacher's id {int(ids.max())}, the teacher has ids 0 to {pair.vocab_t - 1}"
        raise BadArtifact(path, problem, BUILD_AGAIN)
    return Projection(
        ids.clamp(min=NO_MATCH).to(torch.int32).numpy(), weights.masked_fill(ids < 0, 0).numpy()
    )


def _load(path: Path) -> Mapping[Any, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileProblem(path, error.strerror or "it cannot be read") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        problem = f"it is no file of tensors: {str(error).splitlines()[0][:100]}"
        raise BadArtifact(
            path, problem, "give a `.pt` that `write_projection` or NeMo-RL's tools wrote"
        ) from None
    if not isinstance(content, Mapping):
        raise _no_projection(path, f"a {type(content).__name__}")
    return content


def _tables(path: str | Path, content: Mapping[Any, Any]) -> tuple[Tensor, Tensor]:
    ids, weights = content.get("indices"), content.get("likelihoods")
    if not isinstance(ids, Tensor) or not isinstance(weights, Tensor):
        raise _no_projection(path, ", ".join(sorted(map(str, content))[:5]) or "nothing")
    if ids.ndim != 2 or ids.shape != weights.shape:
        shapes = f"`indices` of shape {list(ids.shape)} and `likelihoods` of shape {list(weights.shape)}"
        raise BadArtifact(path, f"it has {shapes}", "both must have one row for each student id")
    return ids, weights


def _no_projection(path: str | Path, got: str) -> BadArtifact:
    wanted = "it must hold the tensors `indices` and `likelihoods`"
    return BadArtifact(path, f"it holds {got}", f"{wanted}: `write_projection` writes it")


def _check_tokenizers(path: str | Path, content: Mapping[Any, Any], pair: TokenizerPair) -> None:
    sides = zip(("teacher", "student"), (pair.name_t, pair.name_s), pair.fingerprints, strict=True)
    for side, name, fingerprint in sides:
        built_for = content.get(f"{side}_fingerprint")
        if built_for is not None and built_for != fingerprint:
            of = str(content.get(f"{side}_model_id", "another tokenizer")), str(built_for)
            raise TokenizerMismatch(
                f"the projection {path}", side, of, (name, fingerprint), "write it again for this pair"
            )
