"""Align two token sequences, by name of the aligner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int64

from cdm_toolkit.alignment.entropy import uniform_weights, weights
from cdm_toolkit.alignment.groups import Alignment
from cdm_toolkit.alignment.sides import Side
from cdm_toolkit.errors import BadOption, UnknownName
from cdm_toolkit.tokdiff.spans import TokenSpans
from cdm_toolkit.tokdiff.view import TokenizerView

AlignerName = Literal["anchored", "bytes", "entropy-dtw", "dtw"]
ALIGNERS: tuple[AlignerName, ...] = get_args(AlignerName)


@dataclass(frozen=True, slots=True, eq=False)
class TextAlignment:
    """A text's tokens on both sides, and how they are aligned."""

    t: TokenSpans
    s: TokenSpans
    alignment: Alignment


def align(
    t: TokenSpans,
    s: TokenSpans,
    *,
    aligner: str = "anchored",
    entropy_t: Float[np.ndarray, " time_t"] | None = None,
    entropy_s: Float[np.ndarray, " time_s"] | None = None,
) -> Alignment:
    """Align two token sequences of one text; `dtw` and `entropy-dtw` take those of two texts also.

    Entropies are of the models' next-token distributions, one a token, in any unit; None weighs all alike.
    `bytes` and `dtw` do not look at them. Raises `UnknownName`, `BadOption` for entropies that do not fit,
    `DoesNotSpell` where `bytes` and `anchored` are given two texts.
    """
    # numba, which these bring, is loaded where an alignment is made and not where the names are read
    from cdm_toolkit.alignment.anchored import align_anchored
    from cdm_toolkit.alignment.bytes import align_by_bytes
    from cdm_toolkit.alignment.dtw import align_by_dtw

    require_known(aligner)
    side_t, side_s = Side.of(t), Side.of(s)
    weight_t, weight_s = side_weights(side_t, entropy_t), side_weights(side_s, entropy_s)
    if aligner == "bytes":
        return align_by_bytes(side_t, side_s)
    if aligner == "anchored":
        return align_anchored(side_t, side_s, weight_t, weight_s)
    if aligner == "dtw":
        weight_t, weight_s = np.ones_like(weight_t), np.ones_like(weight_s)
    return align_by_dtw(side_t, side_s, weight_t, weight_s, aligner=aligner)


def align_text(
    view_t: TokenizerView,
    view_s: TokenizerView,
    text: str,
    *,
    aligner: str = "anchored",
    add_special_tokens: bool = False,
) -> TextAlignment:
    """Encode a text with two tokenizers and align what comes out, without entropies."""
    require_known(aligner)
    t = view_t.encode(text, add_special_tokens=add_special_tokens)
    s = view_s.encode(text, add_special_tokens=add_special_tokens)
    return TextAlignment(t, s, align(t, s, aligner=aligner))


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """The tokens of one group as texts; bytes that are no text by themselves as `\\xe2`."""

    t: tuple[str, ...]
    s: tuple[str, ...]
    kind: str
    exact: bool


def token_groups(aligned: TextAlignment) -> Iterator[TokenGroup]:
    """Walk the groups of an aligned text, in order."""
    for group in aligned.alignment:
        yield TokenGroup(
            _texts(aligned.t, group.t0, group.t1),
            _texts(aligned.s, group.s0, group.s1),
            group.kind,
            group.exact,
        )


def _texts(spans: TokenSpans, begin: int, end: int) -> tuple[str, ...]:
    return tuple(spans.view.token_text(int(token_id)) for token_id in spans.ids[begin:end])


def require_known(aligner: str) -> None:
    """Raise `UnknownName` for a name that is none of `ALIGNERS`."""
    if aligner not in ALIGNERS:
        raise UnknownName("aligner", aligner, ALIGNERS)


def side_weights(side: Side, entropy: Float[np.ndarray, " time"] | None) -> Int64[np.ndarray, " time"]:
    """Weigh a side's tokens by their entropies; `BadOption` where there is not one for each."""
    if entropy is None:
        return uniform_weights(len(side))
    if len(entropy) != len(side):
        raise BadOption("the number of entropies", len(entropy), f"one for each of the {len(side)} tokens")
    return weights(entropy)
