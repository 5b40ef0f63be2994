"""Provenance: what made an artifact."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

from cdm_toolkit import __version__

RECORDED = ("torch", "transformers", "tokenizers", "numpy")


class Provenance(TypedDict):
    """Say how an artifact was made; `seed` and `device` are None where none had a part in it."""

    command: str
    made: str
    versions: dict[str, str]
    fingerprints: dict[str, str]
    seed: int | None
    device: str | None


def provenance(
    command: Sequence[str] | None = None,
    *,
    fingerprints: Mapping[str, str] | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> Provenance:
    """Record what made an artifact, now; `command` is the words of a command line, by default this process's own.

    `fingerprints` names what went in, such as tokenizers. Time is UTC. Asking for versions imports nothing.
    """
    return Provenance(
        command=shlex.join(sys.argv if command is None else command),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={
            "cdm-toolkit": __version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: found for name in RECORDED if (found := _version(name)) is not None},
        },
        fingerprints=dict(fingerprints or {}),
        seed=seed,
        device=device,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
