"""Prefix: a teacher token's mass goes to the student token with which its bytes begin."""

from __future__ import annotations

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import exact_partners, preferred_ids
from cdm_toolkit.vocab_map.types import VocabMap, sides, single


def build_prefix(view_t: TokenizerView, view_s: TokenizerView) -> VocabMap:
    """Map each teacher id to its exact partner, else to the longest student token that its bytes begin with.

    This is the first token of a greedy longest-match split, not always the student's own first token, which
    depends on what follows. Every ordinary teacher token has one if the student has all single bytes. Special
    tokens match by role only.
    """
    best = exact_partners(view_t, view_s)
    students = {data: token_id for data, token_id in preferred_ids(view_s).items() if data}
    longest = max(map(len, students), default=0)
    for token_id, data in enumerate(view_t.token_bytes):
        if data is None or best[token_id] >= 0:
            continue
        for end in range(min(len(data), longest), 0, -1):
            if data[:end] in students:
                best[token_id] = students[data[:end]]
                break
    return single("prefix", sides(view_t, view_s), best)
