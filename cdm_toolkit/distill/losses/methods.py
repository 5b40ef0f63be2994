"""The methods by name: what each is, what it needs, and how it is made of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from cdm_toolkit.distill.losses.alm import AlmSettings, alm
from cdm_toolkit.distill.losses.cdm import CdmSettings, cdm
from cdm_toolkit.distill.losses.gold import gold, gold_settings
from cdm_toolkit.distill.losses.record import Method
from cdm_toolkit.distill.losses.shared import Kind, SharedSettings, shared
from cdm_toolkit.distill.losses.spelled import SpelledSettings, spelled
from cdm_toolkit.distill.losses.static_map import StaticMapSettings, static_map
from cdm_toolkit.distill.losses.uld import UldSettings, uld
from cdm_toolkit.errors import UnknownName
from cdm_toolkit.vocab_map.contextual import PairTable

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

Table = Literal["exact", "neighbours", "mined", "prefix", "spellings"]


@dataclass(frozen=True, slots=True, eq=False)
class Ingredients:
    """All that a method may be made of: options, and the tables of its two tokenizers on the device of training.

    `partner` is the one static map among a method's `tables`: the student id of each teacher id, −1 without
    one. `cdm-near` goes without it where the exact partner is no candidate of its own; `pairs` is of it alone,
    `spelling` and `beginning` (see `SpelledSettings`) of `cdm`.
    """

    vocab_t: int
    vocab_s: int
    partner: Int64[Tensor, " vocab_t"] | None = None
    pairs: PairTable | None = None
    spelling: Int64[Tensor, "vocab_t longest"] | None = None
    beginning: Int64[Tensor, " vocab_s"] | None = None
    inside: bool = True
    temperature: float = 1.0
    top_k: int = 100
    rest_bucket: bool = True
    beta: float = 0.5
    tau: float = 100.0


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method: one line on it, its source, its needs, and how it is made."""

    name: str
    summary: str
    source: str
    make: Callable[[Ingredients], Method]
    tables: tuple[Table, ...] = ()
    """Mappings of the vocabularies that it is built on."""
    same_tokenizer: bool = False
    """Teacher and student must have one tokenizer."""
    needs_tokens: bool = False
    """It looks at whole tokens: `token_*` of `TeacherSays` and `StudentSees`."""
    needs_student_tokens: bool = False
    """It looks at the student's tokens alone: `token_*` of `StudentSees`."""
    needs_top_k: bool = True
    """It looks at the teacher's top k."""


def _cdm(given: Ingredients) -> Method:
    assert given.spelling is not None
    settings = SpelledSettings(
        spelling=given.spelling,
        beginning=given.beginning,
        top_k=given.top_k,
        temperature=given.temperature,
        rest_bucket=given.rest_bucket,
        inside=given.inside,
    )
    return partial(spelled, settings=settings)


def _near(given: Ingredients) -> Method:
    assert given.pairs is not None
    settings = CdmSettings(
        table=given.pairs,
        exact=given.partner,
        top_k=given.top_k,
        temperature=given.temperature,
        rest_bucket=given.rest_bucket,
    )
    return partial(cdm, settings=settings)


def _static_map(given: Ingredients) -> Method:
    assert given.partner is not None
    return partial(
        static_map, settings=StaticMapSettings(given.partner, given.temperature, given.rest_bucket)
    )


def _uld(given: Ingredients) -> Method:
    return partial(uld, settings=UldSettings(given.vocab_t, given.top_k, given.temperature))


def _alm(given: Ingredients) -> Method:
    return partial(alm, settings=AlmSettings(given.tau))


def _gold(given: Ingredients) -> Method:
    assert given.partner is not None
    settings = gold_settings(
        given.partner,
        vocab_s=given.vocab_s,
        top_k=given.top_k,
        temperature=given.temperature,
        beta=given.beta,
    )
    return partial(gold, settings=settings)


def _shared(kind: Kind) -> Callable[[Ingredients], Method]:
    def make(given: Ingredients) -> Method:
        return partial(shared, settings=SharedSettings(kind, given.temperature, given.beta))

    return make


METHODS: Mapping[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec(
            "cdm",
            "KL over the student tokens that the teacher's candidates are spelled by, anew at each position",
            "this tool's, after arXiv 2502.11104",
            _cdm,
            tables=("spellings",),
            needs_student_tokens=True,
        ),
        MethodSpec(
            "cdm-near",
            "KL over pairs of ids of little edit distance that are chosen anew at each position",
            "arXiv 2502.11104",
            _near,
            tables=("exact", "neighbours"),
        ),
        MethodSpec(
            "em",
            "KL over ids with the same bytes",
            "arXiv 2301.12726",
            _static_map,
            tables=("exact",),
        ),
        MethodSpec(
            "mined",
            "KL over a fixed map of least edit distance",
            "arXiv 2401.10491",
            _static_map,
            tables=("mined",),
        ),
        MethodSpec(
            "prefix",
            "KL over the first student token of each teacher token's bytes",
            "a baseline of this tool",
            _static_map,
            tables=("prefix",),
        ),
        MethodSpec("uld", "L1 distance of the sorted probabilities, without a map", "arXiv 2402.12030", _uld),
        MethodSpec(
            "alm",
            "likelihoods of the same pieces of text, without a map",
            "arXiv 2503.20083",
            _alm,
            needs_tokens=True,
            needs_top_k=False,
        ),
        MethodSpec(
            "gold",
            "generalised JSD over ids with the same bytes, L1 by rank over the others",
            "TRL's GOLD trainer",
            _gold,
            tables=("exact",),
            needs_tokens=True,
        ),
        MethodSpec(
            "kl",
            "KL(teacher ‖ student) for one tokenizer",
            "arXiv 1503.02531",
            _shared("kl"),
            same_tokenizer=True,
        ),
        MethodSpec(
            "reverse-kl",
            "KL(student ‖ teacher) for one tokenizer",
            "arXiv 2306.08543",
            _shared("reverse-kl"),
            same_tokenizer=True,
        ),
        MethodSpec(
            "jsd",
            "generalised JSD for one tokenizer",
            "arXiv 2306.13649, equation 1",
            _shared("jsd"),
            same_tokenizer=True,
        ),
    )
}


def build_method(name: str, ingredients: Ingredients) -> Method:
    """Make a method by its name. UnknownName."""
    if name not in METHODS:
        raise UnknownName("method", name, tuple(METHODS))
    return METHODS[name].make(ingredients)
