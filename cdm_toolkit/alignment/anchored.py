"""The `anchored` aligner: byte-boundary groups, and entropy-weighted DTW inside n-m groups.

`anchored_reference` is the definition in plain Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from cdm_toolkit.alignment import kernels
from cdm_toolkit.alignment.bytes import byte_groups
from cdm_toolkit.alignment.dtw import TokenStrings, path_groups
from cdm_toolkit.alignment.groups import Alignment
from cdm_toolkit.alignment.sides import AlignmentSide, token_string

WeightsT = Int64[np.ndarray, " time_t"]
WeightsS = Int64[np.ndarray, " time_s"]
Links = Int32[np.ndarray, "link 2"]


def align_anchored(t: AlignmentSide, s: AlignmentSide, weight_t: WeightsT, weight_s: WeightsS) -> Alignment:
    """Group tokens by shared byte boundaries, then run DTW separately inside each n-m group.

    Where both sides of an n-m group have the same bytes, the group is kept and the DTW path gives its links.
    Where the bytes differ, the group is replaced by the connected components of the path, none of them
    exact. `DoesNotSpell` where the sides are of different texts.
    """
    groups, exact = byte_groups(t, s)
    several = ((groups[:, 1] - groups[:, 0]) > 1) & ((groups[:, 3] - groups[:, 2]) > 1)
    links = kernels.product_links(groups[~several])
    if several.any():
        stretches = groups[several]
        inside_t, inside_s = (
            _StretchTokens.of_side(t, stretches[:, :2]),
            _StretchTokens.of_side(s, stretches[:, 2:]),
        )
        path, lengths = _warp(inside_t, inside_s, weight_t, weight_s)
        links = np.concatenate((links, path))
        # Restore the order of links: i + j grows along the monotone path.
        links = links[np.argsort(links.sum(axis=1), kind="stable")]
        if not exact[several].all():
            parts = np.split(path, np.cumsum(lengths)[:-1])
            fine = [path_groups(part) for part, same in zip(parts, exact[several], strict=True) if not same]
            kept = exact | ~several
            groups = np.concatenate((groups[kept], *fine))
            exact = np.concatenate((exact[kept], np.zeros(len(groups) - int(kept.sum()), bool)))
            order = np.argsort(groups[:, 0] + groups[:, 2], kind="stable")
            groups, exact = groups[order], exact[order]
    return Alignment(groups.astype(np.int32), exact, links, "anchored", len(t), len(s))


@dataclass(frozen=True, slots=True, eq=False)
class _StretchTokens:
    """The tokens of one side inside the stretches (n-m groups) that DTW runs on, concatenated."""

    strings: list[bytes]
    """The distinct token strings."""
    string_index: Int64[np.ndarray, " token"]
    """Index into `strings` of each token."""
    positions: Int64[np.ndarray, " token"]
    """Position of each token in the whole sequence."""
    ranges: Int64[np.ndarray, "stretch 2"]
    """Range `[start, end)` of each stretch in the concatenated tokens."""

    @classmethod
    def of_side(cls, side: AlignmentSide, ranges: Int64[np.ndarray, "stretch 2"]) -> _StretchTokens:
        lengths = ranges[:, 1] - ranges[:, 0]
        ends = np.cumsum(lengths)
        positions = np.repeat(ranges[:, 0] - (ends - lengths), lengths) + np.arange(lengths.sum())
        ids, string_index = np.unique(side.ids[positions], return_inverse=True)
        strings = [token_string(side.view, i) for i in ids.tolist()]
        return cls(strings, string_index, positions, np.stack((ends - lengths, ends), axis=1))

    def strings_in(self, stretch: int) -> list[bytes]:
        start, end = self.ranges[stretch]
        return [self.strings[k] for k in self.string_index[start:end].tolist()]


def _warp(
    t: _StretchTokens, s: _StretchTokens, weight_t: WeightsT, weight_s: WeightsS
) -> tuple[Links, Int64[np.ndarray, " stretch"]]:
    """Run DTW in each stretch; return the concatenated paths and the length of each."""
    count = len(t.ranges)
    swapped = np.fromiter(
        (_swap_in_ties(t.strings_in(k), s.strings_in(k)) for k in range(count)), bool, count
    )
    strings = TokenStrings.of(t.strings, t.string_index, s.strings, s.string_index)
    path, lengths = kernels.warp_stretches(
        np.concatenate((t.ranges, s.ranges), axis=1),
        swapped,
        strings.t,
        strings.index_t,
        weight_t[t.positions],
        strings.s,
        strings.index_s,
        weight_s[s.positions],
        strings.scratch,
    )
    return np.stack((t.positions[path[:, 0]], s.positions[path[:, 1]]), axis=1).astype(np.int32), lengths


def _swap_in_ties(tokens_t: list[bytes], tokens_s: list[bytes]) -> bool:
    """Decide whether DTW runs with the sides swapped, so that the student's step wins ties.

    The side with more tokens comes first, then the one with the lexicographically greater strings. This makes
    the result symmetric: swapping teacher and student transposes the alignment.
    """
    return (len(tokens_s), tokens_s) > (len(tokens_t), tokens_t)
