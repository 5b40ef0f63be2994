"""`cdm signal`: show what a teacher teaches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdm_toolkit.cli import completion, options, screen
from cdm_toolkit.errors import BadOption, UnknownName
from cdm_toolkit.pages import write_page

if TYPE_CHECKING:
    from cdm_toolkit.distill.explain import ComparedPosition, ExplainedGroup, Explanation
    from cdm_toolkit.kd.method import Method
    from cdm_toolkit.kd.pair import TokenizerPair
    from cdm_toolkit.kd.rows import Row
    from cdm_toolkit.tokdiff.view import TokenizerView

app = typer.Typer(no_args_is_help=True, help="Show what a teacher teaches, position by position.")


@app.callback()
def _group() -> None:
    """Keep `show` a word of its own, though it is the only command."""


@app.command()
def show(
    teacher: Annotated[str, options.model("The model to learn from")],
    student: Annotated[str, options.model("The model to train")],
    text: Annotated[
        str | None, typer.Argument(help="The text that is learned. With --completion: the prompt before it.")
    ] = None,
    completion: Annotated[
        str | None, typer.Option(help="Learn this, after TEXT as the prompt, which is read only.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Take a row of this JSONL file instead of a text.")
    ] = None,
    row: Annotated[int, typer.Option(help="Which row of --data: its line number.", min=1)] = 1,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="What compares the two, with settings that are not the defaults: spelling, "
            "spelling:temperature=2,intra_group=false. Twice for two methods, side by side.",
            show_default="spelling",
            autocompletion=completion.methods,
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Candidates of each model at a position.", show_default="100")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of the row, on any side; more are cut.")] = 512,
    template: Annotated[
        str, typer.Option(help="none, or chat: each side reads the row by its own chat template.")
    ] = "none",
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="Also show what a method could know at best: the teacher's distribution of the student's next "
            "token, over many continuations. A second or more for each position.",
        ),
    ] = False,
    device: options.Device = "auto",
    html: Annotated[
        Path | None, typer.Option(help="Write a page that one walks through by mouse or arrow keys.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show at each student position what the teacher predicts, and what a method makes of it.

    The figures are those of a run on this row: the teacher's candidates, the student tokens that a method compares, the
    probability of each under both models, the divergence and its share of the row's whole. The methods are those of cdm
    distill that compare distributions over student tokens.

    Example: cdm signal show "Tokens don't match 1:1" --teacher smollm2 --student student --html signal.html
    """
    from cdm_toolkit.cli.signal_page import signal_page
    from cdm_toolkit.cli.signal_table import signal_table

    specs = _checked(method or ["spelling"], template)
    shown = _row(text, completion, data, row)
    explanation = _explain(
        shown,
        (teacher, student),
        specs,
        top_k=top_k,
        max_length=max_length,
        template=template,
        device=device,
        oracle=oracle,
    )
    if html:
        write_page(html, signal_page(explanation))
        screen.say(f"wrote {html}")
    if as_json:
        screen.print_json(explanation_record(explanation))
    elif not html:
        screen.out().print(signal_table(explanation))


def _checked(specs: list[str], template: str) -> list[str]:
    """See that all methods exist and have outcomes to show, before anything is loaded."""
    from typing import get_args

    from cdm_toolkit.kd.method import find_method
    from cdm_toolkit.kd.tokenized_rows import TemplateName

    if template not in get_args(TemplateName):
        raise UnknownName("template", template, get_args(TemplateName))
    for spec in specs:
        find_method(spec.partition(":")[0]).check_outcomes()
    if len(specs) > 2:
        raise BadOption("method", ", ".join(specs), "one method, or two to see side by side")
    return specs


def _row(text: str | None, completion: str | None, data: Path | None, number: int) -> Row:
    from cdm_toolkit.distill.sources import read_rows
    from cdm_toolkit.kd.rows import Row

    if (text is None) == (data is None):
        raise typer.BadParameter("give a text, or --data, and not both.")
    if data is not None:
        if completion is not None:
            raise typer.BadParameter("--completion goes with a text; a row of --data has its own.")
        rows = {each.number: each for each in read_rows(data)}
        if number not in rows:
            raise BadOption(
                "row", number, f"the line of a row: {data} has {len(rows)}, the last is {max(rows)}"
            )
        return rows[number]
    prompt, learned = ("", text) if completion is None else (text, completion)
    if not learned:
        raise BadOption(
            "text" if completion is None else "completion", learned, "at least one character to learn"
        )
    return Row(1, prompt or "", learned)


def _explain(
    row: Row,
    names: tuple[str, str],
    specs: list[str],
    *,
    top_k: int | None,
    max_length: int,
    template: Any,
    device: str,
    oracle: bool,
) -> Explanation:
    """Load tokenizers, build methods, then load the models: what is wrong with the first is told soon."""
    from cdm_toolkit.artifacts.maps import load_or_build_neighbours
    from cdm_toolkit.distill.explain import explain
    from cdm_toolkit.hub.models import check_positions, check_vocabulary, load_model, resolve_device
    from cdm_toolkit.kd.next_token_oracle import NextTokenOracle
    from cdm_toolkit.kd.pair import TokenizerPair
    from cdm_toolkit.teachers.local import Local

    on = resolve_device(device)
    with screen.err().status("loading the tokenizers") as status:
        pair = TokenizerPair.from_names(*names)
        pair.neighbour_builder = load_or_build_neighbours
        batch = pair.collate([row], max_length=max_length, template=template)
        whole = pair.collate([row], max_length=1 << 30, template=template)
        status.update("building the methods' tables")
        methods = {spec: _method(pair, spec, top_k).to(on) for spec in specs}
        status.update("loading the models")
        models = []
        for name, inputs, vocab in zip(
            names, (batch.teacher, batch.student), (pair.vocab_t, pair.vocab_s), strict=True
        ):
            models.append(load_model(name, device=str(on)))
            check_vocabulary(models[-1], name, vocab)
            check_positions(models[-1], name, inputs["input_ids"].shape[1], option="max_length")
        teacher = Local(models[0], vocab=pair.vocab_t)
        if oracle:
            status.update("asking the oracle, position by position")
        best = (NextTokenOracle(pair), models[0]) if oracle else None
        explanation = explain(batch.to(on), methods, teacher, models[1], oracle=best)
    if cut := len(whole.labels) - len(batch.labels):
        screen.warn(
            f"{cut} of {len(whole.labels)} tokens are cut off by `max_length`, as in a run with {max_length}"
        )
    screen.say_device(str(on))
    return explanation


def _method(pair: TokenizerPair, spec: str, top_k: int | None) -> Method[Any, Any]:
    """Build the method that `name:setting=value,setting=value` names."""
    from cdm_toolkit.artifacts.settings import with_settings
    from cdm_toolkit.kd.method import find_method

    name, _, assignments = spec.partition(":")
    given = {} if top_k is None else {"top_k": top_k}
    settings = with_settings(given, assignments.split(",") if assignments else [], source=name)
    return find_method(name)(pair, **settings)


def explanation_record(explanation: Explanation) -> dict[str, Any]:
    """Convert an explanation for JSON: all candidates and outcomes; groups and positions count from 0."""
    teacher, student = explanation.teacher, explanation.student
    return {
        "teacher": teacher.name,
        "student": student.name,
        "ce": explanation.ce,
        "methods": [
            {"name": method.name, "kd": method.kd, "rest_bucket": method.rest_bucket}
            for method in explanation.methods
        ],
        "tokens": [_token(student, i) for i in explanation.student_ids],
        "groups": [_group_record(teacher, student, group) for group in explanation.groups],
        "positions": [
            {
                "position": each.position,
                "follows": _token(student, each.follows.id) | {"logprob": each.follows.logprob},
                "group": each.group,
                "before": each.before,
                "methods": [compared and _compared_record(student, compared) for compared in each.compared],
            }
            for each in explanation.positions
        ],
    }


def _token(view: TokenizerView, token_id: int) -> dict[str, Any]:
    return {"id": token_id, "text": view.token_text(token_id)}


def _group_record(teacher: TokenizerView, student: TokenizerView, group: ExplainedGroup) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "teacher": [_token(teacher, each.id) | {"logprob": each.logprob} for each in group.teacher],
        "student": [_token(student, i) for i in group.student],
        "candidates": [
            _token(teacher, each.id)
            | {"probability": each.probability, "spelled": [_token(student, i) for i in each.spelled]}
            for each in group.candidates
        ],
    }


def _compared_record(student: TokenizerView, compared: ComparedPosition) -> dict[str, Any]:
    return {
        "divergence": compared.divergence,
        "share": compared.share,
        "outcomes": [
            _token(student, each.id) | {"teacher": each.teacher, "student": each.student}
            for each in compared.outcomes
        ],
        "rest": dict(zip(("teacher", "student"), compared.rest, strict=True)),
    }
