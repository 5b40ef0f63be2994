"""Every error that a person can meet.

Each says what is wrong, what was got, and how to mend it, in one line. Settings and functions are named as in
Python, in backticks; `cli.translate_messages` makes options and commands of them. The command line prints that line on
stderr and exits with 2; a traceback is a bug. `tests/errors.golden.txt` holds one example of each, to be read as
prose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar


def _named(option: str) -> str:
    """Put the name of a setting in backticks; other words for what was given stay as they are."""
    return f"`{option}`" if re.fullmatch(r"[a-z]\w*(\.\w+)*", option) else option


Error = TypeVar("Error", bound="CdmError")
MANY = 60
"""Names that are more are not all listed."""


def _listed(names: Sequence[str]) -> str:
    if len(names) <= MANY:
        return ", ".join(names)
    return f"{', '.join(names[:10])} and {len(names) - 10} more"


class CdmError(Exception):
    """Base of all errors here: `what` is wrong, `got` instead, and the `fix`."""

    def __init__(self, what: str, *, got: str = "", fix: str = "") -> None:
        self.what, self.got, self.fix = what, got, fix
        message = what + (f", {got}" if got else "") + (f"; {fix}" if fix else "")
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple[Callable[..., CdmError], tuple[type[CdmError], str, str, str]]:
        """Let an error out of a worker process: the classes differ in what they are made of."""
        return _remade, (type(self), self.what, self.got, self.fix)


def _remade(kind: type[Error], what: str, got: str, fix: str) -> Error:
    error = kind.__new__(kind)
    CdmError.__init__(error, what, got=got, fix=fix)
    return error


class BadOption(CdmError):
    """An option is outside what it can be."""

    def __init__(self, option: str, value: object, allowed: str) -> None:
        super().__init__(f"{_named(option)} is {value!r}", fix=f"give {allowed}")


class TwoWays(CdmError):
    """Two options are given that ask for different things."""

    def __init__(self, option: str, other: str) -> None:
        super().__init__(f"{_named(option)} and {_named(other)} do not go together", fix="give one of them")


class UnknownName(CdmError):
    """A name that must be one of a few is none of them."""

    def __init__(self, kind: str, name: str, known: Sequence[str]) -> None:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}", fix=f"{hint}known: {_listed(known)}")


# Where tokenizers and models come from


class SourceNotFound(CdmError):
    """No source has what an alias, path or hub id names."""

    def __init__(
        self, name: str, tried: Sequence[str], *, needs: str, near: str | None = None, fix: str = ""
    ) -> None:
        hint = f"did you mean {near}? otherwise " if near else ""
        first = f"{fix}, or " if fix else ""
        super().__init__(
            f"cannot find {name!r}",
            got=f"tried {'; '.join(tried)}",
            fix=f"{hint}{first}give the path of a local folder that holds {needs}, or one of the names that "
            "`list_aliases` gives",
        )


class DamagedSource(CdmError):
    """A file that was fetched is not the one that the alias table names."""

    def __init__(self, name: str, file: str, expected: str, got: str) -> None:
        super().__init__(
            f"{file} for {name!r} is not the file that was recorded",
            got=f"sha256 {got[:12]}… instead of {expected[:12]}…",
            fix="remove it and try again; if that does not help, the package has changed and must not be trusted",
        )


class UnsupportedTokenizer(CdmError):
    """A tokenizer whose token bytes cannot be known exactly."""

    def __init__(self, name: str, why: str, fix: str = "use a tokenizer that has a tokenizer.json") -> None:
        super().__init__(f"the tokenizer {name!r} cannot be read", got=why, fix=fix)


class ModelNotLoaded(CdmError):
    """A folder or id was found, but no model came out of it."""

    def __init__(self, name: str, why: str, fix: str) -> None:
        super().__init__(f"the model {name!r} cannot be loaded", got=why, fix=fix)


class MissingExtra(CdmError):
    """A command needs a package that is an optional part of the installation."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed", fix=f'pip install "cdm-toolkit[{extra}]"'
        )


# Files


class FileProblem(CdmError):
    """A file or folder cannot be read or written."""

    def __init__(self, path: str | Path, problem: str, fix: str = "check the path") -> None:
        super().__init__(f"{path}: {problem}", fix=fix)


class BadRow(CdmError):
    """A row of a data file lacks what is needed. Rows are counted from 1."""

    def __init__(self, path: str | Path, row: int, problem: str, fix: str) -> None:
        super().__init__(f"{path}, row {row}: {problem}", fix=fix)


class OutputExists(CdmError):
    """An output folder holds something already."""

    def __init__(self, path: str | Path, *, can_resume: bool = False) -> None:
        resume = ", `resume` to go on from its last checkpoint" if can_resume else ""
        super().__init__(
            f"the output {path} exists and is not empty",
            fix=f"give `overwrite` to replace it{resume}, or another `output`",
        )


class BadArtifact(CdmError):
    """A file that this toolkit writes is damaged, foreign or of another version."""

    def __init__(self, path: str | Path, problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}", fix=fix)


class TokenizerMismatch(CdmError):
    """Something was built for other tokenizers than the ones at hand."""

    def __init__(
        self, what: str, side: str, built_for: tuple[str, str], given: tuple[str, str], fix: str
    ) -> None:
        super().__init__(
            f"{what} was built for {built_for[0]} ({built_for[1][:8]}…) as {side}",
            got=f"the {side} given is {given[0]} ({given[1][:8]}…)",
            fix=fix,
        )

    @classmethod
    def by_size(cls, what: str, holds: str, tokenizer: str, ids: int) -> TokenizerMismatch:
        """Say it of something that does not name its tokenizer, but has ids of another number."""
        return _remade(
            cls,
            f"{what} holds {holds}",
            f"the tokenizer {tokenizer} has {ids:,} ids",
            "give the tokenizer of the model that made it as `tokenizer`",
        )


# Texts, tokens and alignments


class BadText(CdmError):
    """A text that no tokenizer can take, such as one with a lone surrogate."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"the text {problem}", fix=fix)


class UnknownTokenId(CdmError):
    """An id outside the vocabulary."""

    def __init__(self, tokenizer: str, token_id: int, size: int) -> None:
        super().__init__(
            f"the id {token_id} is not in the vocabulary of {tokenizer}",
            got=f"which has ids 0 to {size - 1}",
            fix="check that the ids come from this tokenizer",
        )


class DoesNotSpell(CdmError):
    """Token ids do not spell the text that they are said to stand for."""

    def __init__(self, tokenizer: str, position: int, token: str, expected: bytes) -> None:
        super().__init__(
            f"the ids of {tokenizer} do not spell the text",
            got=f"token {position} ({token}) stands where the text has {expected!r}",
            fix="encode the text with this tokenizer, or choose `aligner='dtw'`, which aligns any two sequences",
        )


# Teachers behind a server


class ServerProblem(CdmError):
    """A server does not do what a teacher, or a student that samples, has to."""

    def __init__(self, url: str, problem: str, fix: str) -> None:
        self.url, self.problem = url, problem
        super().__init__(f"the server {url} {problem}", fix=fix)


# Training and evaluation


class BadSettings(CdmError):
    """Faults of a run's settings, all at once."""

    faults: tuple[str, ...] = ()

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        many, those = (f"{len(faults)} faults", "them") if len(faults) > 1 else ("a fault", "it")
        super().__init__(f"{source} has {many}: {'; '.join(faults)}", fix=f"mend {those} and run again")
        self.faults = tuple(faults)


class NothingToTrain(CdmError):
    """No row of the data is left to train on."""

    def __init__(self, path: str | Path, counts: str) -> None:
        super().__init__(
            f"{path}: no row can be trained on",
            got=counts,
            fix="raise `max_length`, or check the data's fields",
        )


class NotFinite(CdmError):
    """A loss or logit became NaN or infinite."""

    def __init__(self, what: str, step: int, kept: str) -> None:
        super().__init__(
            f"{what} is not finite at step {step}",
            got=kept,
            fix="lower the learning rate, or check the data of that step",
        )


class Interrupted(CdmError):
    """A person or a scheduler stopped a command that can go on later. The command line exits with 130."""

    def __init__(self, what: str, kept: str, go_on: str) -> None:
        super().__init__(f"{what} was stopped", got=kept, fix=f"go on with: {go_on}")


class VocabularyTooSmall(CdmError):
    """A model's embedding has fewer rows than its tokenizer has ids."""

    def __init__(self, model: str, rows: int, ids: int) -> None:
        super().__init__(
            f"{model} has {rows} embedding rows, its tokenizer {ids} ids",
            fix="give the tokenizer that belongs to this model, or resize its embedding",
        )


class NoData(CdmError):
    """An evaluation has no data within reach."""

    def __init__(self, suite: str, tried: Sequence[str], fields: str, *, fix: str = "") -> None:
        super().__init__(
            f"no data for the suite {suite!r}",
            got=f"tried {'; '.join(tried)}",
            fix=fix or f"give a JSONL file with {fields} as `data`",
        )


class CodeNotAllowed(CdmError):
    """A suite would run programs that a model writes, and nobody has said that it may."""

    def __init__(self, suite: str, programs: int, isolation: str) -> None:
        super().__init__(
            f"the suite {suite!r} runs {programs} programs that a model writes",
            got=f"each in a process of its own, isolated by: {isolation}",
            fix="allow it with `allow_code_execution=True`",
        )


class IsolationMissing(CdmError):
    """The machine cannot set up the isolation layers that untrusted programs need."""

    def __init__(self, lacking: str, why: str) -> None:
        super().__init__(
            f"the sandbox lacks {lacking} on this machine",
            got=why,
            fix="run on Linux where user namespaces are allowed, such as a virtual machine of its own",
        )
