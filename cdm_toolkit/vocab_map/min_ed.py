"""MinED: ids without an exact partner go to the id at the least edit distance (arXiv 2401.10491, FuseLLM).

`min_ed_reference.py` is the definition.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.edit_distance import Progress, nearest
from cdm_toolkit.vocab_map.exact import exact_partners
from cdm_toolkit.vocab_map.keys import token_keys
from cdm_toolkit.vocab_map.near import blocks, joined, search
from cdm_toolkit.vocab_map.neighbours import check_workers, without_partner
from cdm_toolkit.vocab_map.types import VocabMap, sides, single


def build_min_ed(
    view_t: TokenizerView,
    view_s: TokenizerView,
    *,
    match_digits: bool = True,
    workers: int = 1,
    progress: Progress | None = None,
) -> VocabMap:
    """Map each teacher id to its exact partner, else to the student id at the least Lev(a, b) / (|a| + |b|).

    Blanks count: ` the` is not `the`. Ties go to the shorter token in bytes, then to the lower id. Where no
    student token keeps a single character of the teacher's, or with `match_digits` none has the same digits and
    operators, there is no match. Special tokens never match by distance. Lengths are characters, or bytes
    where either token is not whole characters. `progress` gets (done, total). BadOption for workers below 1.
    """
    check_workers(workers)
    best = exact_partners(view_t, view_s)
    queries = without_partner(token_keys(view_t, strip=False), view_t, view_s)
    through = blocks(queries, token_keys(view_s, strip=False), match_digits=match_digits)
    found = joined(list(search(through, partial(nearest, workers=workers), progress)))
    # Whole characters met their choices in two blocks, by characters and by bytes: the nearer of both wins.
    order = np.lexsort((found.tie, found.edits / found.total, found.query))
    first = order[np.diff(found.query[order], prepend=-1) != 0]
    best[found.query[first]] = found.choice[first]
    return single("min-ed", sides(view_t, view_s), best, match_digits=match_digits)
