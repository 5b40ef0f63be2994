"""MinED: map ids without an exact partner to the id at the least edit distance (FuseLLM, arXiv 2401.10491).

`static_reference.py` is the definition in plain Python.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.edit_distance import ProgressCallback, nearest
from cdm_toolkit.vocab_map.exact import exact_partners
from cdm_toolkit.vocab_map.keys import token_keys
from cdm_toolkit.vocab_map.neighbours import check_workers, without_partner
from cdm_toolkit.vocab_map.token_distances import concatenate_pairs, distance_blocks, search_blocks
from cdm_toolkit.vocab_map.types import VocabMap, pair_info, single_match_map


def build_min_ed(
    view_t: TokenizerView,
    view_s: TokenizerView,
    *,
    match_digits: bool = True,
    workers: int = 1,
    progress: ProgressCallback | None = None,
) -> VocabMap:
    """Map each teacher id to its exact partner, else to the student id at the least Lev(a, b) / (|a| + |b|).

    Whitespace counts: ` the` is not `the`. Ties go to the shorter token in bytes, then to the lower id. There is
    no match where no student token has a character in common, or, with `match_digits`, the same digits and
    operators. Special tokens never match by distance. Lengths are in characters, or in bytes where either token is
    not valid UTF-8. `progress` gets (done, total). BadOption for workers below 1.
    """
    check_workers(workers)
    best = exact_partners(view_t, view_s)
    queries = without_partner(token_keys(view_t, strip=False), view_t, view_s)
    token_blocks = distance_blocks(queries, token_keys(view_s, strip=False), match_digits=match_digits)
    found = concatenate_pairs(list(search_blocks(token_blocks, partial(nearest, workers=workers), progress)))
    # A token of valid UTF-8 is a query of two blocks, one in characters and one in bytes: keep the nearer result.
    order = np.lexsort((found.tie, found.edits / found.total, found.query))
    first = order[np.diff(found.query[order], prepend=-1) != 0]
    best[found.query[first]] = found.choice[first]
    return single_match_map("min-ed", pair_info(view_t, view_s), best, match_digits=match_digits)
