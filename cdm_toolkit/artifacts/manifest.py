"""What stands in front of everything on disk: its format, who made it, of which files, and what differs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cdm_toolkit.artifacts.atomic import write_whole
from cdm_toolkit.artifacts.code_fingerprint import code_fingerprint
from cdm_toolkit.errors import BadArtifact, FileProblem

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of artifact, and the versions of it that are read."""

    name: str
    version: int
    """Goes up when the layout of files, or the meaning of what is in them, changes."""
    again: str
    """The fix where a file cannot be used."""
    older: tuple[int, ...] = ()
    """Versions before that are read too."""
    unmarked: int | None = None
    """The version of files that name neither format nor version."""
    code: tuple[str, ...] = ()
    """Parts of the package that decide what is in it (`code_fingerprint`)."""

    def header(self, made_by: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Write down what is to be kept: format, version, hash of the code, facts, and `made_by`, a `Provenance`."""
        code = {"code": code_fingerprint(*self.code)} if self.code else {}
        return {"format": self.name, "version": self.version, **code, **facts, "provenance": made_by}

    def read(self, path: Path, again: str | None = None) -> dict[str, Any]:
        """Read a header from a JSON file. FileProblem where there is none, and as `check`."""
        return self.check(path, read_json(path, again or self.again), again)

    def check(self, path: str | Path, found: Any, again: str | None = None) -> dict[str, Any]:
        """Give a header that can be used. BadArtifact for one of another format or version, with who made it."""
        fix = again or self.again
        if not isinstance(found, dict) or found.get("format", self.unmarked and self.name) != self.name:
            raise BadArtifact(path, f"this is no {self.name} file", f"give another file, or {fix}")
        version = found.get("version", self.unmarked)
        if version not in (self.version, *self.older):
            problem = f"it has format version {version}, this tool reads {_and(self.version, *self.older)}"
            raise BadArtifact(path, problem + _maker(found), fix)
        return found


def _and(*versions: int) -> str:
    return " and ".join(map(str, versions))


def _maker(found: Mapping[str, Any]) -> str:
    try:
        return f"; it was made by cdm-toolkit {found['provenance']['versions']['cdm-toolkit']}"
    except (KeyError, TypeError):
        return ""


def read_json(path: Path, again: str) -> Any:
    """Read JSON. FileProblem where there is none, BadArtifact where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise FileProblem(path, f"it cannot be read ({error.strerror})", again) from None
    except ValueError as error:
        raise BadArtifact(path, f"it is damaged ({error})", again) from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all. FileProblem where it cannot be written."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def validated(kind: type[Record], path: Path, found: Any, again: str) -> Record:
    """Make a dataclass or pydantic model of what JSON has; BadArtifact with the first field that is wrong."""
    try:
        made: Record = _adapter(kind).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise BadArtifact(path, f"it is damaged ({where}: {first['msg']})", again) from None
    return made


_adapter: Callable[[Any], Any] = cache(TypeAdapter)


# Files


@dataclass(frozen=True, slots=True)
class FileSum:
    """The size of a file in bytes and its sha256, by which it is known again; either may be unknown."""

    size: int | None
    sha256: str | None

    def check_size(self, path: Path, again: str) -> None:
        """Raise BadArtifact where a file is missing or has another size."""
        if not path.is_file():
            raise BadArtifact(path, "it is missing", again)
        if self.size is not None and (size := path.stat().st_size) != self.size:
            raise BadArtifact(path, f"it is damaged: it has {size:,} bytes instead of {self.size:,}", again)

    def check(self, path: Path, again: str) -> None:
        """Raise BadArtifact where a file is missing or differs; the whole file is read."""
        self.check_size(path, again)
        if self.sha256 is not None and (digest := sha256_of(path)) != self.sha256:
            problem = f"it is damaged: its sha256 is {digest[:12]}… instead of {self.sha256[:12]}…"
            raise BadArtifact(path, problem, again)


def sha256_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """List files of a folder for its header: size and sha256 by name."""
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(files)
    }


# What differs


def differences(there: Any, now: Any, name: str = "") -> Iterator[str]:
    """Say in which facts two records are not the same, those within others by their path.

    >>> list(differences({"k": 20, "run": {"lr": 0.1}}, {"k": 30, "run": {"lr": 0.1, "seed": None}}))
    ['k is 20 there and 30 now', 'run.seed is only now']
    """
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*there, *now)):
            inner = f"{name}.{key}" if name else str(key)
            if key not in now or key not in there:
                yield f"{inner} is only {'there' if key in there else 'now'}"
            else:
                yield from differences(there[key], now[key], inner)
    elif there != now:
        yield f"{name} is {_shown(there)} there and {_shown(now)} now"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"{value[:8]}…" if re.fullmatch("[0-9a-f]{64}", value) else value
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
