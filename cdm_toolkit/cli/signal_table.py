"""What is taught at each position, as a table for the terminal."""

from __future__ import annotations

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text

from cdm_toolkit.cli import screen
from cdm_toolkit.cli.align_rows import KIND_STYLES
from cdm_toolkit.cli.visible import token_label
from cdm_toolkit.distill.explain import ComparedPosition, ExplainedPosition, Explanation

SHOWN = 3
"""Candidates and outcomes of a position; a page and JSON have more."""


def signal_table(explanation: Explanation) -> RenderableType:
    """Lay out a row of a table for each position, and the losses below it."""
    teacher = f"{explanation.teacher.name}\npredicts"
    heads = [f"{method.name}\nteacher → student" for method in explanation.methods]
    table = screen.table(None, "token that\nfollows", "group", teacher, *heads)
    table.show_lines = True
    for position in explanation.positions:
        table.add_row(
            _follows(explanation, position),
            _group(explanation, position),
            _candidates(explanation, position),
            *(_outcomes(explanation, position, nth) for nth in range(len(explanation.methods))),
        )
    return Lines(table, *(Text(line) for line in loss_lines(explanation)))


def probability(value: float) -> str:
    """Write a probability with three decimals, and tell a small one from none.

    >>> probability(0.25), probability(2e-7), probability(0.0)
    ('0.250', '<.001', '0.000')
    """
    return "<.001" if 0 < value < 0.0005 else f"{max(value, 0.0):.3f}"


def kl_and_share(compared: ComparedPosition) -> str:
    """Write the divergence of a position, and its share of the row's."""
    return f"KL {compared.divergence:.3f}, {max(compared.share, 0.0):.1%}"


def why_not_compared(position: ExplainedPosition) -> str:
    """Say why a method compares nothing at a position."""
    return "not aligned" if position.group is None else "not compared inside this group"


def _follows(explanation: Explanation, position: ExplainedPosition) -> Text:
    from math import exp

    text = Text(token_label(explanation.student, position.follows.id), style="bold")
    return text.append(f"\n{probability(exp(position.follows.logprob))}", style="not bold dim")


def _group(explanation: Explanation, position: ExplainedPosition) -> Text:
    if position.group is None:
        return Text("none", style="dim")
    group = explanation.groups[position.group]
    text = Text(group.kind, style=KIND_STYLES.get(group.kind, ""))
    if group.kind != "1-1":
        tokens = " · ".join(token_label(explanation.teacher, each.id) for each in group.teacher)
        text.append(f"\n{tokens}", style="dim")
    return text


def _candidates(explanation: Explanation, position: ExplainedPosition) -> Text:
    if position.group is None or position.before:
        return Text("inside" if position.before else "", style="dim")
    candidates = explanation.groups[position.group].candidates[:SHOWN]
    lines = [f"{probability(c.probability)} {token_label(explanation.teacher, c.id)}" for c in candidates]
    return Text("\n".join(lines))


def _outcomes(explanation: Explanation, position: ExplainedPosition, nth: int) -> Text:
    compared = position.compared[nth]
    if compared is None:
        return Text(why_not_compared(position), style="dim")
    text = Text(kl_and_share(compared), style="bold")
    shown = compared.outcomes[:SHOWN]
    for outcome in shown:
        label = token_label(explanation.student, outcome.id)
        text.append(f"\n{_both(outcome.teacher, outcome.student)} {label}", style="not bold")
    others = _both(1 - sum(o.teacher for o in shown), 1 - sum(o.student for o in shown))
    return text.append(f"\n{others} others", style="not bold dim")


def _both(teacher: float, student: float) -> str:
    return f"{probability(teacher)} → {probability(student)}"


def loss_lines(explanation: Explanation) -> list[str]:
    """Write the losses of the row, by method, and the cross-entropy."""
    groups = len(explanation.groups)
    lines = [
        f"{method.name}: KD {method.kd:.4f} nats a group, {method.kd * groups:.3f} in all {groups} groups"
        for method in explanation.methods
    ]
    return [*lines, f"CE {explanation.ce:.4f} nats a token, over {len(explanation.positions)} tokens"]
