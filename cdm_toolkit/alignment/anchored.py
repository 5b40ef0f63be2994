"""The `anchored` aligner: byte-boundary groups, and entropy-weighted DTW inside n-m groups.

`anchored_reference` is the definition in plain Python.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, Int64

from cdm_toolkit.alignment import kernels
from cdm_toolkit.alignment.bytes import byte_groups
from cdm_toolkit.alignment.dtw import path_groups, token_distance
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
        path, lengths = _warp(t, s, stretches, weight_t, weight_s)
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


def _warp(
    t: AlignmentSide,
    s: AlignmentSide,
    stretches: Int64[np.ndarray, "stretch 4"],
    weight_t: WeightsT,
    weight_s: WeightsS,
) -> tuple[Links, Int64[np.ndarray, " stretch"]]:
    """Run DTW in each stretch (n-m group); return the concatenated paths and the length of each."""
    pairs = kernels.product_links(stretches)
    distinct, index = np.unique(
        t.ids[pairs[:, 0]].astype(np.int64) << 32 | s.ids[pairs[:, 1]], return_inverse=True
    )
    distances = [
        token_distance(token_string(t.view, pair >> 32), token_string(s.view, pair & 0xFFFF_FFFF))
        for pair in distinct.tolist()
    ]
    swapped = [
        _swap_in_ties(_strings(t, t0, t1), _strings(s, s0, s1)) for t0, t1, s0, s1 in stretches.tolist()
    ]
    return kernels.warp_stretches(
        stretches, np.array(swapped), np.array(distances, np.int16)[index], weight_t, weight_s
    )


def _strings(side: AlignmentSide, first: int, last: int) -> list[bytes]:
    return [token_string(side.view, i) for i in side.ids[first:last].tolist()]


def _swap_in_ties(tokens_t: list[bytes], tokens_s: list[bytes]) -> bool:
    """Decide whether DTW runs with the sides swapped, so that the student's step wins ties.

    The side with more tokens comes first, then the one with the lexicographically greater strings. This makes
    the result symmetric: swapping teacher and student transposes the alignment.
    """
    return (len(tokens_s), tokens_s) > (len(tokens_t), tokens_t)
