"""Fetch files of the model hub through huggingface_hub: its cache, login, HF_ENDPOINT and HF_HUB_OFFLINE."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from cdm_toolkit.errors import FileProblem

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
HUB_SECONDS = 5.0
"""How long the hub may take to say which commit a revision is; HF_HUB_ETAG_TIMEOUT, where set, is taken instead."""

_COMMIT = re.compile("[0-9a-f]{40}")
_IGNORED = ("*/*", "consolidated*")
"""Files in subfolders are other formats of the same model; so is `consolidated.safetensors`."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Needed:
    """The files of a repository that a caller needs.

    `choices` are patterns of files; a later choice is taken where an earlier one has brought none of `anchors`.
    """

    choices: tuple[tuple[str, ...], ...]
    anchors: tuple[str, ...]
    what: str

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has one of the anchors."""
        return any(next(folder.glob(pattern), None) for pattern in self.anchors)


_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
TOKENIZER = Needed(
    (
        (
            *TOKENIZER_FILES,
            "merges.txt",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "config.json",
            "chat_template.jinja",
        ),
    ),
    TOKENIZER_FILES,
    "tokenizer files",
)
MODEL = Needed(tuple((*_SMALL, weights) for weights in WEIGHTS), WEIGHTS, "weights")


class HubProblem(Exception):
    """Why the hub did not give a repository's files, and the fix.

    `everywhere` is set where it holds for all repositories: the hub is not there, or must not be asked.
    """

    def __init__(self, reason: str, fix: str, *, everywhere: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.fix, self.everywhere = reason, fix, everywhere


@dataclass(slots=True)
class _Process:
    """What this process has learnt of the hub and said of it."""

    commits: dict[tuple[str, str], str] = field(default_factory=dict)
    unreachable: HubProblem | None = None
    said: set[str] = field(default_factory=set)


_process = _Process()


def say_once(subject: str, message: str) -> None:
    """Log a warning, once a process for each subject."""
    if subject not in _process.said:
        _process.said.add(subject)
        log.warning(message)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, as huggingface_hub reads it, which is not imported for this."""
    if constants := sys.modules.get("huggingface_hub.constants"):
        return bool(constants.HF_HUB_OFFLINE)
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def hub_cache() -> Path:
    """Return the folder of huggingface_hub's cache, which is not imported for this."""
    if constants := sys.modules.get("huggingface_hub.constants"):
        return Path(constants.HF_HUB_CACHE)
    own = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{above}/huggingface"
    return Path(os.path.expandvars(own or f"{home}/hub")).expanduser()


def fetch(hub_id: str, revision: str | None, needed: Needed) -> Path:
    """Return a folder with a repository's files, named for their commit; what the hub's cache lacks is downloaded.

    The hub is asked once a process for the commit of a revision, and not at all for a commit whose files are here.
    Where it gives no answer, the files in its cache are taken, which is said. Raises HubProblem, and FileProblem where
    the cache cannot be written.
    """
    revision = revision or "main"
    found = cached(hub_id, revision, needed)
    if found and _COMMIT.fullmatch(revision):
        return found
    try:
        return _downloaded(hub_id, revision, _commit(hub_id, revision), needed)
    except _NoSuchRevision:
        raise
    except HubProblem as problem:
        if found is None:
            raise
        if not is_offline():
            subject = "" if problem.everywhere else hub_id
            say_once(subject, f"{problem.reason}: {hub_id} is taken from the hub's cache, {found.name[:12]}")
        return found


def cached(hub_id: str, revision: str | None, needed: Needed) -> Path | None:
    """Return the folder of a revision's files in the hub's cache, without network access; None where some lack."""
    if not (hub_cache() / f"models--{hub_id.replace('/', '--')}").is_dir():
        return None
    from huggingface_hub.errors import LocalEntryNotFoundError

    for patterns in needed.choices:
        with suppress(LocalEntryNotFoundError):
            folder = _snapshot(hub_id, revision or "main", patterns, local_files_only=True)
            if needed.is_in(folder):
                return folder
    return None


def _snapshot(hub_id: str, revision: str, patterns: tuple[str, ...], **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(_IGNORED),
            etag_timeout=_seconds(),
            **options,
        )
    )


def _downloaded(hub_id: str, revision: str, commit: str, needed: Needed) -> Path:
    """Download what the cache lacks of a commit, and note there that the revision is this commit."""
    log.info("fetching %s of %s from the hub", needed.what, hub_id)
    for patterns in needed.choices:
        try:
            folder = _snapshot(hub_id, commit, patterns)
        except Exception as error:  # many types, including those of the HTTP library
            raise _download_problem(error, hub_id, revision) from None
        if needed.is_in(folder):
            _note_revision(folder.parents[1] / "refs" / revision, commit)
            return folder
    raise HubProblem(f"it has no {needed.what}", f"name a repository that has {needed.what}")


def _note_revision(ref: Path, commit: str) -> None:
    """Write what huggingface_hub looks a revision up by offline; a cache that cannot be written is left as it is."""
    with suppress(OSError):
        if ref.name == commit or (ref.is_file() and ref.read_text() == commit):
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        fresh = ref.with_name(f".{ref.name}.{os.getpid()}")
        fresh.write_text(commit)
        fresh.replace(ref)


# Which commit is a revision?


def _commit(hub_id: str, revision: str) -> str:
    """Return the commit of a revision, from the hub, asked once a process. Raises HubProblem."""
    if is_offline():
        reason = "HF_HUB_OFFLINE is set and the hub's cache does not have it"
        raise HubProblem(reason, "unset HF_HUB_OFFLINE once to fetch it", everywhere=True)
    if _process.unreachable:
        raise _process.unreachable
    if (hub_id, revision) not in _process.commits:
        _process.commits[hub_id, revision] = _ask_commit(hub_id, revision)
    return _process.commits[hub_id, revision]


def _ask_commit(hub_id: str, revision: str) -> str:
    from huggingface_hub import constants, errors, hf_hub_url

    try:
        url = hf_hub_url(hub_id, "config.json", revision=revision, endpoint=constants.ENDPOINT)
        commit = _within(_seconds(), lambda: _head(url))
    except errors.HfHubHTTPError as error:
        raise _answered_problem(error, hub_id, revision) from None
    except errors.HFValidationError as error:
        raise HubProblem(_one_line(error), "check the spelling") from None
    except Exception as error:  # of the HTTP library, whichever that is, and of sockets
        reason = f"the hub {constants.ENDPOINT} is out of reach ({_one_line(error)})"
        _process.unreachable = HubProblem(reason, "check the network and HF_ENDPOINT", everywhere=True)
        raise _process.unreachable from None
    if commit is None:
        reason = f"{constants.ENDPOINT} does not answer as a model hub"
        raise HubProblem(reason, "check HF_ENDPOINT and the proxy", everywhere=True)
    return commit


def _head(url: str) -> str | None:
    """Return the commit that a file's header names; a gated repository refuses this request too."""
    from huggingface_hub import constants, errors, get_hf_file_metadata

    try:
        # the clock of `_within` ends first, so that a slow hub is told in one way
        return get_hf_file_metadata(url, timeout=2 * _seconds()).commit_hash
    except errors.EntryNotFoundError as error:  # a repository of a tokenizer alone
        headers: dict[str, str] = error.response.headers  # type: ignore[attr-defined]
        return headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)


def _within(seconds: float, ask: Callable[[], str | None]) -> str | None:
    """Call a function, for at most some seconds by the clock: name look-up and many addresses know no other limit."""
    answers: SimpleQueue[tuple[str | None, Exception | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error:
        raise error
    return answer


def _seconds() -> float:
    return float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or HUB_SECONDS)


# What went wrong, in a few words


class _NoSuchRevision(HubProblem):
    """The hub has the repository but not the revision: an older copy would be another one."""


def _answered_problem(error: Any, hub_id: str, revision: str) -> HubProblem:
    """Describe a refusal of the hub."""
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            fix = f"ask for access at {constants.ENDPOINT}/{hub_id} and log in, or set HF_TOKEN"
            return HubProblem("it is gated, and this login has no access", fix)
        case errors.RepositoryNotFoundError():
            fix = "check the spelling, log in or set HF_TOKEN where it is private"
            return HubProblem("there is no such repository, or it is private", fix)
        case errors.RevisionNotFoundError():
            return _NoSuchRevision(f"it has no revision {revision!r}", "name a branch, tag or commit of it")
    status = error.response.status_code
    fix = "check HF_TOKEN" if status in (401, 403) else "try again later"
    return HubProblem(f"the hub answered with status {status}", fix)


def _download_problem(error: Exception, hub_id: str, revision: str) -> HubProblem:
    """Describe why a download failed. Raises FileProblem where the cache cannot be written."""
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        return _answered_problem(error, hub_id, revision)
    if isinstance(error, OSError) and error.errno:
        problem = f"cannot write to the hub's cache: {error.strerror}"
        raise FileProblem(constants.HF_HUB_CACHE, problem, "free space there, or set HF_HUB_CACHE") from None
    reason = f"the download broke off ({_one_line(error)})"
    return HubProblem(reason, "try again: what has arrived is kept")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
