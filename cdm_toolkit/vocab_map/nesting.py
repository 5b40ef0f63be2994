"""Whether a student's tokens are parts of its teacher's, in every text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cdm_toolkit.tokdiff.view import TokenizerView

BYTE_LEVEL = "byte-level BPE"


def nesting_fault(view_t: TokenizerView, view_s: TokenizerView) -> str:
    """Say in a clause why the student's tokens are not parts of the teacher's; nothing where they are.

    They are where both are byte-level BPE, split a text alike, and the student makes the teacher's first merges and
    stops: the teacher then merges what the student has. The student's tokens of any text are those of the
    teacher's tokens, one after the other (arXiv 2512.14954).
    """
    for view in (view_t, view_s):
        if view.family != BYTE_LEVEL:
            return f"{view.name} is {view.family}, not {BYTE_LEVEL}"
    t, s = (json.loads(view.backend.to_str()) for view in (view_t, view_s))
    for part, does in (("normalizer", "normalizes"), ("pre_tokenizer", "splits")):
        if t.get(part) != s.get(part):
            return f"{view_s.name} {does} a text in another way than {view_t.name}"
    added_t, added_s = (
        {token["content"] for token in _plain(each, view)} for each, view in ((t, view_t), (s, view_s))
    )
    if added_t != added_s:
        return f"the added token {min(added_t ^ added_s)!r} is in one of the two alone"
    return _other_merge(t["model"], s["model"], view_t.name, view_s.name)


def _plain(description: Any, view: TokenizerView) -> Iterator[Any]:
    """Give the added tokens that are not special: a text is cut at them before it is split."""
    return (token for token in description["added_tokens"] if token["id"] not in view.special)


def _other_merge(teacher: Any, student: Any, name_t: str, name_s: str) -> str:
    """Find what the student merges and the teacher does not, or the reverse before the student's last merge.

    A merge of a part that the student does not have cannot come before one that it has not made.
    """
    known, wanted = student["vocab"], list(map(_pair, student["merges"]))
    made = (pair for pair in map(_pair, teacher["merges"]) if pair[0] in known and pair[1] in known)
    for nth, merge in enumerate(wanted, 1):
        own = next(made, None)
        if own != merge:
            shown = "none" if own is None else " + ".join(own)
            return f"merge {nth} of {name_s} is {' + '.join(merge)}, that of {name_t} {shown}"
    if student.get("ignore_merges") and not (
        teacher.get("ignore_merges") and known.keys() <= teacher["vocab"].keys()
    ):
        return f"{name_s} takes words whole that {name_t} does not"
    return ""


def _pair(merge: Any) -> tuple[str, str]:
    """Split a merge, which older files have as one string with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
