"""Groups by bytes wherever bytes decide, by entropy-weighted DTW inside them. Twin: `anchored_reference`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from cdm_toolkit.alignment import kernels
from cdm_toolkit.alignment.bytes import byte_groups
from cdm_toolkit.alignment.dtw import Strings, path_groups
from cdm_toolkit.alignment.groups import Alignment
from cdm_toolkit.alignment.sides import Side, token_string

WeightsT = Int64[np.ndarray, " time_t"]
WeightsS = Int64[np.ndarray, " time_s"]
Links = Int32[np.ndarray, "link 2"]


def align_anchored(t: Side, s: Side, weight_t: WeightsT, weight_s: WeightsS) -> Alignment:
    """Group tokens by bytes; warp each group of several tokens on both sides alone.

    Where such a group spells the same on both sides, the path gives its links and the group stays. Where it
    does not, the path's components are the groups, none of them exact. `DoesNotSpell` where the sides are
    of different texts.
    """
    groups, exact = byte_groups(t, s)
    several = ((groups[:, 1] - groups[:, 0]) > 1) & ((groups[:, 3] - groups[:, 2]) > 1)
    links = kernels.product_links(groups[~several])
    if several.any():
        stretches = groups[several]
        inside_t, inside_s = _Inside.of_side(t, stretches[:, :2]), _Inside.of_side(s, stretches[:, 2:])
        path, lengths = _warp(inside_t, inside_s, weight_t, weight_s)
        links = np.concatenate((links, path))
        links = links[
            np.argsort(links.sum(axis=1), kind="stable")
        ]  # grows from link to link; merges two runs
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
class _Inside:
    """The tokens of one side that are in stretches, end to end."""

    tokens: list[bytes]  # distinct ones
    of: Int64[np.ndarray, " token"]  # which of them each is
    places: Int64[np.ndarray, " token"]  # where each is in the whole sequence
    ranges: Int64[np.ndarray, "stretch 2"]

    @classmethod
    def of_side(cls, side: Side, ranges: Int64[np.ndarray, "stretch 2"]) -> _Inside:
        lengths = ranges[:, 1] - ranges[:, 0]
        ends = np.cumsum(lengths)
        places = np.repeat(ranges[:, 0] - (ends - lengths), lengths) + np.arange(lengths.sum())
        ids, of = np.unique(side.ids[places], return_inverse=True)
        tokens = [token_string(side.view, i) for i in ids.tolist()]
        return cls(tokens, of, places, np.stack((ends - lengths, ends), axis=1))

    def strings(self, stretch: int) -> list[bytes]:
        start, end = self.ranges[stretch]
        return [self.tokens[k] for k in self.of[start:end].tolist()]


def _warp(
    t: _Inside, s: _Inside, weight_t: WeightsT, weight_s: WeightsS
) -> tuple[Links, Int64[np.ndarray, " stretch"]]:
    """Give the paths through all stretches, end to end, and the length of each."""
    count = len(t.ranges)
    turned = np.fromiter((_student_leads(t.strings(k), s.strings(k)) for k in range(count)), bool, count)
    strings = Strings.of(t.tokens, t.of, s.tokens, s.of)
    path, lengths = kernels.warp_stretches(
        np.concatenate((t.ranges, s.ranges), axis=1),
        turned,
        strings.t,
        strings.of_t,
        weight_t[t.places],
        strings.s,
        strings.of_s,
        weight_s[s.places],
        strings.scratch,
    )
    return np.stack((t.places[path[:, 0]], s.places[path[:, 1]]), axis=1).astype(np.int32), lengths


def _student_leads(tokens_t: list[bytes], tokens_s: list[bytes]) -> bool:
    """Tell who takes the teacher's place in ties: the side with more tokens, then with the greater strings.

    So that swapping the sides transposes the alignment.
    """
    return (len(tokens_s), tokens_s) > (len(tokens_t), tokens_t)
