"""What is taught at each position, as a page: the text as a heat map, and the figures of the position in focus.

Each position is laid out here, escaped, in a `<template>`; the script copies the one that is in focus onto the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import exp, sqrt

from cdm_toolkit.cli.align_page import KIND_COLOURS, html_page
from cdm_toolkit.cli.signal_table import kl_and_share, probability, why_not_compared
from cdm_toolkit.cli.visible import token_label
from cdm_toolkit.distill.explain import (
    ComparedPosition,
    ExplainedGroup,
    ExplainedPosition,
    Explanation,
    Outcome,
)
from cdm_toolkit.tokdiff.vocabulary import Vocabulary

SHOWN = 10
"""Candidates and outcomes of a position; the others are summed up. JSON has all."""
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Heats in the legend."""

_STYLE = """
:root { --heat: #e5702a; --t: #0072b2; --s: #c77700; --ring: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --heat: #d2601f; --t: #56b4e9; --s: #e69f00; --ring: #a8c7fa; } }
* { box-sizing: border-box; }
fieldset { border: 0; padding: 0; margin: 1rem 0 .3rem; font-size: .9rem; }
legend { float: left; padding: 0; margin-right: .8rem; }
fieldset label { margin-right: 1rem; white-space: nowrap; }
.text { max-height: 42vh; position: sticky; top: 0; z-index: 1; background: var(--paper);
        overflow: auto; border: 1px solid var(--line); border-radius: 6px; padding: .5rem .6rem;
        line-height: 2.1; margin: .5rem 0; }
.text span, .text button, code { font: 14px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
        overflow-wrap: anywhere; }
.text span { color: var(--faint); display: inline-block; max-width: 100%; }
.text button { color: var(--ink); border: 0; border-bottom: 3px solid var(--kind); border-radius: 0; margin: 0;
        padding: 0 .12em; cursor: pointer; max-width: 100%; text-align: left; }
.text button, .heats i { background: color-mix(in srgb, var(--heat) calc(var(--h) * 72%), var(--paper)); }
.text button.last { margin-right: .3em; }
.text button.alone { border-bottom-style: dashed; --kind: var(--faint); }
[data-by="0"] button { --h: var(--h0); } [data-by="1"] button { --h: var(--h1); }
[data-by="2"] button { --h: var(--h2); }
.text button[aria-current] { outline: 2px solid var(--ink); outline-offset: 1px; position: relative; }
:focus-visible, .text button[aria-current]:focus-visible { outline: 3px solid var(--ring); outline-offset: 2px; }
.heats i { width: 1.6em; border: 1px solid var(--line); }
.heats:not(.by0), [data-by="1"] .heats.by0, [data-by="2"] .heats.by0 { display: none; }
[data-by="1"] .heats.by1, [data-by="2"] .heats.by2 { display: flex; }
.legend { margin: .4rem 0; }
#detail h2 { margin: 1.2rem 0 .3rem; } #detail h3 { font-size: .95rem; margin: .8rem 0 .2rem; }
#detail p { margin: .2rem 0; } mark { background: none; color: inherit; font-weight: 700; text-decoration: underline; }
.kind-of { border-bottom: 3px solid var(--kind); padding: 0 .2em; margin-right: .4em; font-weight: 700; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2rem; }
.columns table { width: 100%; table-layout: fixed; } .columns th, .columns td { padding: .15rem .4rem .15rem 0; }
.columns th { font-weight: 400; overflow-wrap: anywhere; }
.columns thead th { color: var(--faint); font-size: .8rem; overflow-wrap: normal; white-space: nowrap; }
.columns .bars { width: 30%; } .columns .figure { width: 4.6em; } .columns tbody .bars { vertical-align: middle; }
.bars i { display: block; height: .45em; margin: 1px 0; width: calc(var(--w) * 100%); background: var(--t); }
.bars i.s { background: var(--s); }
.columns tr.follows th { font-weight: 700; } .columns tr.sum { color: var(--faint); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
kbd { border: 1px solid var(--line); border-radius: 3px; padding: 0 .3em; font-size: .85em; }
@media (max-width: 600px) { body { padding: 0 .8rem; margin: 1rem auto; } .text { max-height: 30vh; } }
"""

_SCRIPT = """
const text = document.getElementById("text"), detail = document.getElementById("detail");
const tokens = [...text.querySelectorAll("button")];
let at = Number(text.dataset.first);
function show(to, focus) {
  tokens[at].tabIndex = -1;
  tokens[at].removeAttribute("aria-current");
  at = Math.max(0, Math.min(tokens.length - 1, to));
  tokens[at].tabIndex = 0;
  tokens[at].setAttribute("aria-current", "true");
  detail.replaceChildren(document.getElementById("p" + at).content.cloneNode(true));
  if (focus) tokens[at].focus();
}
function onLine(step) {
  const own = tokens[at].getBoundingClientRect(), middle = own.left + own.width / 2;
  let line = null, best = at, least = Infinity;
  for (let i = at + step; i >= 0 && i < tokens.length; i += step) {
    const box = tokens[i].getBoundingClientRect();
    if (Math.abs(box.top - own.top) < own.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > own.height / 2) break;
    const away = Math.abs(box.left + box.width / 2 - middle);
    if (away < least) { best = i; least = away; }
  }
  return best;
}
text.addEventListener("click", event => {
  const token = event.target.closest("button");
  if (token) show(tokens.indexOf(token), true);
});
document.addEventListener("keydown", event => {
  const inText = text.contains(document.activeElement);
  if (event.ctrlKey || event.altKey || event.metaKey || !(inText || document.activeElement === document.body)) return;
  const to = { ArrowRight: () => at + 1, ArrowLeft: () => at - 1, Home: () => 0, End: () => tokens.length - 1,
               ArrowDown: () => inText ? onLine(1) : null, ArrowUp: () => inText ? onLine(-1) : null }[event.key]?.();
  if (to == null) return;
  event.preventDefault();
  show(to, true);
});
document.querySelectorAll("input[name=by]").forEach(input => {
  input.addEventListener("change", () => { document.getElementById("page").dataset.by = input.value; });
  if (input.checked) document.getElementById("page").dataset.by = input.value;
});
show(at, false);
"""


def signal_page(explanation: Explanation) -> str:
    """Render an explanation as a page that one walks through, position by position."""
    groups, positions = len(explanation.groups), explanation.positions
    losses = "; ".join(
        f"{method.name}: KD {method.kd:.4f} nats a group, {method.kd * groups:.3f} in all {groups} groups"
        for method in explanation.methods
    )
    facts = f"{losses}. Cross-entropy {explanation.ce:.4f} nats a token, over {len(positions)} tokens."
    templates = "".join(
        f'<template id="p{nth}">{_detail(explanation, position)}</template>\n'
        for nth, position in enumerate(positions)
    )
    body = (
        f'<main id="page" data-by="0">\n{_choice(explanation)}\n{_legends(explanation)}\n{_text(explanation)}\n'
        '<p class="faint">Click a token, or walk with <kbd>←</kbd> <kbd>→</kbd> <kbd>↑</kbd> <kbd>↓</kbd> '
        "<kbd>Home</kbd> <kbd>End</kbd>.</p>\n"
        f'<section id="detail" aria-label="The position in focus"></section>\n</main>\n{templates}'
        f"<script>{_SCRIPT}</script>"
    )
    title = f"What {explanation.teacher.name} teaches {explanation.student.name}"
    return html_page(title, facts, body, style=_STYLE)


# The text


def _choice(explanation: Explanation) -> str:
    if len(explanation.methods) == 1:
        return ""
    inputs = "".join(
        f'<label><input type="radio" name="by" value="{nth}"{" checked" if nth == 0 else ""}> '
        f"{escape(method.name)}</label>"
        for nth, method in enumerate(explanation.methods)
    )
    return f"<fieldset><legend>Colour by the KL of</legend>{inputs}</fieldset>"


def _legends(explanation: Explanation) -> str:
    heats = "".join(
        f'<ul class="legend heats by{nth}" aria-label="Share of the text’s KL"><li>share of the text’s KL:</li>'
        + "".join(f'<li><i style="--h: {h}"></i>{h * h * _largest(explanation, nth):.1%}</li>' for h in STEPS)
        + "</ul>"
        for nth in range(len(explanation.methods))
    )
    kinds = "".join(
        f'<li style="--kind: {KIND_COLOURS[kind]}"><i></i>{kind}</li>'
        for kind in ("1-1", "1-n", "n-1", "n-m")
    )
    return f'{heats}<ul class="legend"><li>tokens that belong together, teacher-student:</li>{kinds}</ul>'


def _largest(explanation: Explanation, nth: int) -> float:
    shares = (each.compared[nth] for each in explanation.positions)
    return max((compared.share for compared in shares if compared), default=0.0)


def _text(explanation: Explanation) -> str:
    positions = explanation.positions
    read = explanation.student_ids[: positions[0].position + 1]
    student = explanation.student
    prompt = "".join(f"<span>{escape(token_label(student, i))}</span>{_break(student, i)}" for i in read)
    largest = [_largest(explanation, nth) or 1.0 for nth in range(len(explanation.methods))]
    first = max(range(len(positions)), key=lambda nth: _share(positions[nth], 0))
    tokens = "".join(
        _button(explanation, nth, largest, in_focus=nth == first) for nth in range(len(positions))
    )
    return (
        f'<div id="text" class="text" role="group" aria-label="The text, in tokens of the student" '
        f'data-first="{first}">{prompt}{tokens}</div>'
    )


def _button(explanation: Explanation, nth: int, largest: Sequence[float], *, in_focus: bool) -> str:
    position = explanation.positions[nth]
    heats = (f"--h{n}: {sqrt(_share(position, n) / most):.3f}" for n, most in enumerate(largest))
    group = None if position.group is None else explanation.groups[position.group]
    names = ["alone" if group is None else ""]
    names += ["last" if group is None or position.before == len(group.student) - 1 else ""]
    kind = "" if group is None else f"; --kind: {KIND_COLOURS[group.kind]}"
    label = escape(token_label(explanation.student, position.follows.id))
    breaks = _break(explanation.student, position.follows.id)
    return (
        f'<button type="button" class="{" ".join(filter(None, names))}" style="{"; ".join(heats)}{kind}" '
        f'tabindex="{0 if in_focus else -1}" aria-controls="detail" '
        f'aria-label="{escape(_spoken(explanation, position))}">{label}</button>{breaks}'
    )


def _break(view: Vocabulary, token_id: int) -> str:
    return "<br>" if "\n" in view.token_text(token_id) else ""


def _share(position: ExplainedPosition, nth: int) -> float:
    compared = position.compared[nth]
    return max(compared.share, 0.0) if compared else 0.0


def _spoken(explanation: Explanation, position: ExplainedPosition) -> str:
    parts = [token_label(explanation.student, position.follows.id)]
    if position.group is not None:
        parts.append(explanation.groups[position.group].kind)
    for method, compared in zip(explanation.methods, position.compared, strict=True):
        parts.append(f"{method.name} {kl_and_share(compared) if compared else why_not_compared(position)}")
    return ", ".join(parts)


# The position in focus


def _detail(explanation: Explanation, position: ExplainedPosition) -> str:
    student = explanation.student
    follows = _code(student, position.follows.id)
    chance = probability(exp(position.follows.logprob))
    group = None if position.group is None else explanation.groups[position.group]
    parts = [
        f"<h2>Position {position.position}: {follows} follows</h2>",
        f"<p>The student gives it the probability {chance} ({-position.follows.logprob:.3f} nats).</p>",
    ]
    columns = [
        _method(explanation, position, nth, compared) for nth, compared in enumerate(position.compared)
    ]
    if group is not None:
        parts.append(_group(explanation, group, position))
        columns.insert(0, _candidates(explanation, group, position))
    return f'{"".join(parts)}<div class="columns">{"".join(columns)}</div>'


def _group(explanation: Explanation, group: ExplainedGroup, position: ExplainedPosition) -> str:
    of_teacher = " ".join(
        f"{_code(explanation.teacher, each.id)} ({probability(exp(each.logprob))})" for each in group.teacher
    )
    of_student = " ".join(
        f"<mark>{_code(explanation.student, token)}</mark>"
        if nth == position.before
        else _code(explanation.student, token)
        for nth, token in enumerate(group.student)
    )
    kind = f'<span class="kind-of" style="--kind: {KIND_COLOURS[group.kind]}">{group.kind}</span>'
    return f"<p>{kind} teacher: {of_teacher} · student: {of_student}</p>"


def _candidates(explanation: Explanation, group: ExplainedGroup, position: ExplainedPosition) -> str:
    real = group.teacher[0].id
    shown = [c for nth, c in enumerate(group.candidates) if nth < SHOWN or c.id == real]
    rows = [
        _row(
            _code(explanation.teacher, each.id),
            [each.probability],
            follows=each.id == real,
            more=_spelled(explanation.student, each.spelled),
        )
        for each in shown
    ]
    rows.append(_row("all others", [1 - sum(each.probability for each in shown)], kind="sum"))
    where = "before the group" if position.before else "here"
    head = f"{escape(explanation.teacher.name)} predicts {where}"
    return _table(head, "token, as the student writes it", ["p"], rows)


def _spelled(student: Vocabulary, tokens: Sequence[int]) -> str:
    """Show how the student writes a candidate, where it takes several tokens, or cannot."""
    if len(tokens) == 1:
        return ""
    written = "·".join(_code(student, each) for each in tokens) if tokens else "no tokens"
    return f' <span class="faint">= {written}</span>'


def _method(
    explanation: Explanation, position: ExplainedPosition, nth: int, compared: ComparedPosition | None
) -> str:
    method = explanation.methods[nth]
    if compared is None:
        return f"<section><h3>{escape(method.name)}</h3><p>{why_not_compared(position)}</p></section>"
    real = position.follows.id
    shown = [each for n, each in enumerate(compared.outcomes) if n < SHOWN or each.id == real]
    rows = [
        _row(_code(explanation.student, each.id), [each.teacher, each.student], follows=each.id == real)
        for each in shown
    ]
    hidden = [each for each in compared.outcomes if each not in shown]
    rows += _sums(hidden, compared, rest_bucket=method.rest_bucket)
    head = f"{escape(method.name)}: {kl_and_share(compared)} of the text’s"
    note = ""
    if all(each.id != real for each in compared.outcomes):
        note = f"<p>{_code(explanation.student, real)}, which follows, is no outcome.</p>"
    return _table(head, "student token", ["teacher", "student"], rows, note)


def _sums(hidden: Sequence[Outcome], compared: ComparedPosition, *, rest_bucket: bool) -> Iterator[str]:
    if hidden:
        masses = [sum(each.teacher for each in hidden), sum(each.student for each in hidden)]
        yield _row(f"{len(hidden)} more outcomes", masses, kind="sum")
    rest = "the rest, as one outcome" if rest_bucket else "the rest, not compared"
    yield _row(rest, compared.rest, kind="sum")


def _row(
    token: str, masses: Sequence[float], *, follows: bool = False, kind: str = "", more: str = ""
) -> str:
    bars = "".join(
        f'<i class="{side}" style="--w: {min(max(p, 0.0), 1.0):.4f}"></i>'
        for side, p in zip("ts", masses, strict=False)
    )
    figures = "".join(f'<td class="figure">{probability(p)}</td>' for p in masses)
    sign = ' ✓<span class="unseen"> follows</span>' if follows else ""
    name = f' class="{kind or "follows"}"' if kind or follows else ""
    return (
        f'<tr{name}><th scope="row">{token}{more}{sign}</th><td class="bars" aria-hidden="true">{bars}</td>'
        f"{figures}</tr>"
    )


def _table(head: str, first: str, heads: Sequence[str], rows: Sequence[str], note: str = "") -> str:
    columns = "".join(f'<th scope="col" class="figure">{each}</th>' for each in heads)
    return (
        f'<section><h3>{head}</h3><table><thead><tr><th scope="col">{first}</th>'
        f'<th class="bars" aria-hidden="true"></th>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>{note}</section>"
    )


def _code(view: Vocabulary, token_id: int) -> str:
    return f"<code>{escape(token_label(view, token_id))}</code>"
