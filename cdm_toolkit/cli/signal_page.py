"""What is taught at each position, as a page: the text as a heat map, and the figures of the position in focus.

Each position is laid out in a `<template>`; the page's script copies the one that is in focus onto the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from typing import TypeVar

from cdm_toolkit.cli.align_page import KINDS
from cdm_toolkit.cli.signal_table import kl_and_share, loss_lines, probability, why_not_compared
from cdm_toolkit.cli.visible import token_label
from cdm_toolkit.distill.explain import Candidate, ExplainedPosition, Explanation, Outcome
from cdm_toolkit.pages import render

SHOWN = 10
"""Candidates and outcomes of a position; the others are summed up. JSON has all."""
HEATS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the legend."""

_Item = TypeVar("_Item", Candidate, Outcome)


@dataclass(frozen=True, slots=True)
class _Token:
    """A token of the text that can be in focus."""

    id: int
    kind: str | None
    """Of its group; None where it is not aligned."""
    is_last: bool
    """Of its group."""
    heats: Sequence[float]
    """From 0 to 1, by method."""
    spoken: str
    """What a screen reader says."""


def signal_page(explanation: Explanation) -> str:
    """Render an explanation as a page that one walks through, position by position."""
    positions, student = explanation.positions, explanation.student
    return render(
        "signal.html.j2",
        title=f"What {explanation.teacher.name} teaches {student.name}",
        about="; ".join(loss_lines(explanation)),
        explanation=explanation,
        teacher=explanation.teacher,
        student=student,
        methods=explanation.methods,
        kinds=KINDS,
        legends=[list(_legend(largest)) for largest in _largest(explanation)],
        prompt=explanation.student_ids[: positions[0].position + 1],
        tokens=list(_tokens(explanation)),
        first=max(range(len(positions)), key=lambda nth: _share(positions[nth], 0)),
        label=token_label,
        breaks=lambda token_id: "\n" in student.token_text(token_id),
        first_and=_first_and,
        exp=exp,
        probability=probability,
        kl_and_share=kl_and_share,
        why_not_compared=why_not_compared,
    )


def _first_and(token_id: int, items: Sequence[_Item]) -> list[_Item]:
    """Take the first items, and that of a token wherever it is."""
    return [each for nth, each in enumerate(items) if nth < SHOWN or each.id == token_id]


def _share(position: ExplainedPosition, nth: int) -> float:
    compared = position.compared[nth]
    return max(compared.share, 0.0) if compared else 0.0


def _largest(explanation: Explanation) -> list[float]:
    """Give the largest share of a position, by method."""
    return [
        max(_share(position, nth) for position in explanation.positions)
        for nth in range(len(explanation.methods))
    ]


def _legend(largest: float) -> Iterator[tuple[float, str]]:
    for heat in HEATS:
        yield heat, f"{heat * heat * largest:.1%}"


def _tokens(explanation: Explanation) -> Iterator[_Token]:
    largest = _largest(explanation)
    for position in explanation.positions:
        group = None if position.group is None else explanation.groups[position.group]
        kind = None if group is None else group.kind
        yield _Token(
            position.follows.id,
            kind,
            group is None or position.before == len(group.student) - 1,
            [sqrt(_share(position, nth) / (most or 1.0)) for nth, most in enumerate(largest)],
            ", ".join(_spoken(explanation, position, kind)),
        )


def _spoken(explanation: Explanation, position: ExplainedPosition, kind: str | None) -> Iterator[str]:
    yield token_label(explanation.student, position.follows.id)
    if kind:
        yield kind
    for method, compared in zip(explanation.methods, position.compared, strict=True):
        yield f"{method.name} {kl_and_share(compared) if compared else why_not_compared(position)}"
