"""Prefix map: each teacher token maps to the longest student token that is a prefix of its bytes."""

from __future__ import annotations

from cdm_toolkit.tokdiff.view import TokenizerView
from cdm_toolkit.vocab_map.exact import exact_partners, preferred_ids
from cdm_toolkit.vocab_map.types import VocabMap, pair_info, single_match_map


def build_prefix(view_t: TokenizerView, view_s: TokenizerView) -> VocabMap:
    """Map each teacher id to its exact partner, else to the longest student token that is a prefix of its bytes.

    This is the first token of a greedy longest-match split. The student's own tokenizer may start differently,
    depending on what follows. Every ordinary teacher token has a match if the student has all 256 single bytes.
    Special tokens match by role only.
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
    return single_match_map("prefix", pair_info(view_t, view_s), best)
