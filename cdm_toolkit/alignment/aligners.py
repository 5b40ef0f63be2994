"""Entry points: align two token sequences with an aligner chosen by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int64

from cdm_toolkit.alignment.entropy import uniform_weights, weights
from cdm_toolkit.alignment.groups import Alignment
from cdm_toolkit.alignment.sides import AlignmentSide
from cdm_toolkit.errors import BadOption, UnknownName
from cdm_toolkit.tokdiff.spans import TokenSpans
from cdm_toolkit.tokdiff.view import TokenizerView

AlignerName = Literal["anchored", "bytes", "entropy-dtw", "dtw"]
ALIGNERS: tuple[AlignerName, ...] = get_args(AlignerName)


@dataclass(frozen=True, slots=True, eq=False)
class TextAlignment:
    """The teacher and student tokens of one text, and their alignment."""

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
    """Align the teacher's and the student's tokens of one text.

    `dtw` and `entropy-dtw` also accept tokens of two different texts. `entropy_t` and `entropy_s` are the
    entropies of the models' next-token distributions, one per token, in any unit; None gives all tokens the
    same weight. `bytes` and `dtw` ignore them. Raises `UnknownName`, `BadOption` where the number of
    entropies is not the number of tokens, `DoesNotSpell` where `bytes` or `anchored` get two different texts.
    """
    # Imported here because these modules load numba, which listing the aligner names does not need.
    from cdm_toolkit.alignment.anchored import align_anchored
    from cdm_toolkit.alignment.bytes import align_by_bytes
    from cdm_toolkit.alignment.dtw import align_by_dtw

    require_known(aligner)
    side_t, side_s = AlignmentSide.of(t), AlignmentSide.of(s)
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
    """Encode a text with two tokenizers and align the tokens, without entropies."""
    require_known(aligner)
    t = view_t.encode(text, add_special_tokens=add_special_tokens)
    s = view_s.encode(text, add_special_tokens=add_special_tokens)
    return TextAlignment(t, s, align(t, s, aligner=aligner))


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """The tokens of one group as text; bytes that are not valid UTF-8 are escaped as `\\xe2`."""

    t: tuple[str, ...]
    s: tuple[str, ...]
    kind: str
    exact: bool


def token_groups(aligned: TextAlignment) -> Iterator[TokenGroup]:
    """Yield the groups of an aligned text, in order."""
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
    """Raise `UnknownName` unless the name is one of `ALIGNERS`."""
    if aligner not in ALIGNERS:
        raise UnknownName("aligner", aligner, ALIGNERS)


def side_weights(
    side: AlignmentSide, entropy: Float[np.ndarray, " time"] | None
) -> Int64[np.ndarray, " time"]:
    """Turn the entropies of a side into token weights; `BadOption` unless there is one per token."""
    if entropy is None:
        return uniform_weights(len(side))
    if len(entropy) != len(side):
        raise BadOption("the number of entropies", len(entropy), f"one for each of the {len(side)} tokens")
    return weights(entropy)
