"""What holds of every alignment."""

from __future__ import annotations

from typing import Any

import numpy as np

from cdm_toolkit.alignment.groups import Alignment, in_order


def transposed(alignment: Alignment) -> Alignment:
    """Swap teacher and student."""
    groups, exact = in_order(alignment.groups[:, [2, 3, 0, 1]], alignment.exact)
    links = alignment.links[:, ::-1]
    links = links[np.lexsort((links[:, 1], links[:, 0]))]
    return Alignment(groups, exact, links, alignment.aligner, alignment.n_s, alignment.n_t)


def invariant_violations(alignment: Alignment, t: Any = None, s: Any = None) -> list[str]:
    """List violations of the invariants of an alignment: gaps, crossings, empty groups. Empty if valid.

    With the spans of both sides, also list where a group could be split in two: a group is minimal when no
    cut between its teacher tokens is at the same byte as a cut between its student tokens.
    """
    found, at_t, at_s = [], 0, 0
    for group in alignment:
        t0, t1, s0, s1 = group.t0, group.t1, group.s0, group.s1
        if (t0, s0) != (at_t, at_s) or t1 < t0 or s1 < s0:
            found.append(f"{group} does not follow ({at_t}, {at_s})")
        if t0 == t1 and s0 == s1:
            found.append(f"{group} is empty")
        at_t, at_s = t1, s1
        if t is not None and s is not None:
            found += [
                f"{group} can be cut before ({i}, {j})"
                for i in range(t0 + 1, t1)
                for j in range(s0 + 1, s1)
                if max(t.end[i - 1], s.end[j - 1]) <= min(t.start[i], s.start[j])
            ]
    if (at_t, at_s) != (alignment.n_t, alignment.n_s):
        found.append(f"the groups end at ({at_t}, {at_s}) of ({alignment.n_t}, {alignment.n_s})")
    return found
