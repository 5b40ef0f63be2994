"""`cdm tokenizer`: inspect a tokenizer, compare two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdm_toolkit.cli import completion, options, screen
from cdm_toolkit.cli.corpus_file import read_corpus

if TYPE_CHECKING:
    from cdm_toolkit.alignment.statistics import PairStatistics
    from cdm_toolkit.tokdiff.diff import TokenizerDiff, TokenizerSummary

app = typer.Typer(no_args_is_help=True, help="Inspect a tokenizer, compare two.")


@app.command("list")
def list_tokenizers(as_json: options.AsJson = False) -> None:
    """List the locally available tokenizers, with family and size. Does not use the network."""
    from cdm_toolkit.hub.resolve import list_aliases
    from cdm_toolkit.hub.tokenizers import load_view

    statuses = list_aliases()
    views = {status.alias: load_view(status.alias) for status in statuses if status.here}
    if as_json:
        screen.print_json(
            [
                {"alias": s.alias, "here": s.here, "source": s.source}
                | ({"size": views[s.alias].vocab_size, "family": views[s.alias].family} if s.here else {})
                for s in statuses
            ]
        )
        return
    rows = [
        (s.alias, f"{view.vocab_size:,}", view.family, view.fingerprint[:8])
        if (view := views.get(s.alias))
        else (s.alias, "", f"not here: {s.source}", "")
        for s in statuses
    ]
    screen.print_table(None, ("alias", "ids", "family", "fingerprint"), rows, right=("ids",))


@app.command()
def info(
    name: Annotated[
        str, typer.Argument(help="An alias, a folder or a hub id.", autocompletion=completion.models)
    ],
    as_json: options.AsJson = False,
) -> None:
    """Show a tokenizer's family, size, normalisers, special tokens by role and longest tokens.

    Example: cdm tokenizer info qwen2
    """
    from cdm_toolkit.hub.tokenizers import load_view
    from cdm_toolkit.tokdiff.diff import diff

    view = load_view(name)
    side = diff(view, view).a
    if as_json:
        screen.print_json(_side_record(side))
        return
    screen.print_table(None, ("what", name), _facts(side))


@app.command("diff")
def compare(
    first: Annotated[
        str | None, typer.Argument(help="First tokenizer, instead of --t1.", autocompletion=completion.models)
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(help="Second tokenizer, instead of --t2.", autocompletion=completion.models),
    ] = None,
    t1: options.FirstTokenizerIfGiven = None,
    t2: options.SecondTokenizerIfGiven = None,
    corpus: Annotated[
        Path | None, typer.Option(help="JSONL or text file: also compare the tokenization of its texts.")
    ] = None,
    workers: options.Workers = 1,
    as_json: options.AsJson = False,
) -> None:
    """Compare two tokenizers: ids with equal bytes, moved ids, special tokens by role, longest tokens.

    Example: cdm tokenizer diff --t1 llama3 --t2 qwen2 --corpus gsm8k_test.jsonl
    """
    from cdm_toolkit.cli.report import print_statistics, run_report
    from cdm_toolkit.hub.tokenizers import load_view
    from cdm_toolkit.tokdiff.diff import diff

    a, b = _two_tokenizers((first, second), (t1, t2))
    texts = read_corpus(corpus) if corpus else None
    found = diff(load_view(a), load_view(b))
    measured = run_report(a, b, texts, aligner="anchored", workers=workers).total if texts else None
    if as_json:
        screen.print_json(_diff_record(found, measured))
        return
    _print_diff(found)
    if measured:
        print_statistics(a, b, measured)


def _two_tokenizers(
    by_position: tuple[str | None, str | None], by_option: tuple[str | None, str | None]
) -> tuple[str, str]:
    """Take the names of two tokenizers, which are given by position or as --t1 and --t2, in one way only."""
    given = [pair for pair in (by_position, by_option) if any(name is not None for name in pair)]
    match given:
        case [(str(a), str(b))]:
            return a, b
        case [_, _]:
            raise typer.BadParameter(
                "name the tokenizers as --t1 and --t2 or by position, and not both ways."
            )
        case _:
            raise typer.BadParameter("name two tokenizers: --t1 and --t2.")


def _facts(side: TokenizerSummary) -> list[tuple[str, str]]:
    view, scheme = side.view, side.view.scheme
    return [
        ("family", view.family),
        ("ids", f"{view.vocab_size:,}, of which {side.without_bytes:,} special or unused"),
        ("normalizers", ", ".join(scheme.normalizers) or "none"),
        ("prefix", "puts a blank before a text" if scheme.dummy_prefix else "none"),
        ("fingerprint", view.fingerprint[:16]),
        ("special tokens", _specials(side)),
        ("longest tokens", _longest(side)),
    ]


def _specials(side: TokenizerSummary) -> str:
    return "\n".join(
        f"{role}: {', '.join(f'{special.content} ({special.id})' for special in specials[:4])}"
        f"{f' and {len(specials) - 4} more' if len(specials) > 4 else ''}"
        for role, specials in side.special_by_role.items()
    )


def _longest(side: TokenizerSummary) -> str:
    from cdm_toolkit.cli.visible import token_label

    shown = []
    for token_id in side.longest[:5]:
        data = side.view.token_bytes[token_id] or b""
        label = token_label(side.view, token_id)
        shown.append(f"{len(data)} bytes: {label if len(label) <= 24 else label[:24] + '…'} ({token_id})")
    return "\n".join(shown)


def _print_diff(found: TokenizerDiff) -> None:
    name_a, name_b = found.a.view.name, found.b.view.name
    if found.same:
        screen.line(f"{name_a} and {name_b} are the same tokenizer.")
    sides = zip(_facts(found.a), _facts(found.b), strict=True)
    rows = [(what, fact_a, fact_b) for (what, fact_a), (_, fact_b) in sides]
    rows.append(("tokens the other has not", f"{found.a.only_here:,}", f"{found.b.only_here:,}"))
    screen.print_table(None, ("what", name_a, name_b), rows)
    screen.line(
        f"{len(found.shared):,} ids stand for the same bytes on both sides; {len(found.moved):,} of them have another "
        f"number. Roles on one side only: {', '.join(found.roles_of_one) or 'none'}."
    )


def _side_record(side: TokenizerSummary) -> dict[str, Any]:
    view = side.view
    return {
        "name": view.name,
        "family": view.family,
        "size": view.vocab_size,
        "special_or_unused": side.without_bytes,
        "normalizers": list(view.scheme.normalizers),
        "dummy_prefix": bool(view.scheme.dummy_prefix),
        "fingerprint": view.fingerprint,
        "special_by_role": {
            role: [{"id": special.id, "content": special.content} for special in specials]
            for role, specials in side.special_by_role.items()
        },
        "longest": [{"id": i, "text": view.token_text(i)} for i in side.longest],
    }


def _diff_record(found: TokenizerDiff, measured: PairStatistics | None) -> dict[str, Any]:
    from cdm_toolkit.cli.report import statistics_record

    return {
        "same": found.same,
        "a": _side_record(found.a) | {"only_here": found.a.only_here},
        "b": _side_record(found.b) | {"only_here": found.b.only_here},
        "shared": len(found.shared),
        "moved": len(found.moved),
        "roles_of_one": list(found.roles_of_one),
    } | ({"corpus": statistics_record(measured)} if measured else {})
