"""Provenance: the command, versions, inputs, seed and device that made an artifact."""

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
    """How an artifact was made; `seed` and `device` are None where they do not apply."""

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
    """Record how an artifact is made now; `command` is a command line as words, by default this process's own.

    `fingerprints` are of the inputs by name, such as tokenizers. Time is UTC. Package versions are read from
    metadata, without importing the packages.
    """
    return Provenance(
        command=shlex.join(sys.argv if command is None else command),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={
            "cdm-toolkit": __version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: found for name in RECORDED if (found := installed_version(name)) is not None},
        },
        fingerprints=dict(fingerprints or {}),
        seed=seed,
        device=device,
    )


def installed_version(package: str) -> str | None:
    """Read a package's version from its metadata; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
