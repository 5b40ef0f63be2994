"""`cdm vocab-map`: map a teacher's vocabulary to a student's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdm_toolkit.cli import options, screen
from cdm_toolkit.cli.corpus_file import read_corpus
from cdm_toolkit.cli.settings_options import given, record_option
from cdm_toolkit.errors import BadOption, FileProblem, TokenizerMismatch, UnknownName, UnknownTokenId
from cdm_toolkit.pages import render, write_page

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int64

    from cdm_toolkit.artifacts.maps import MapSettings
    from cdm_toolkit.tokdiff.view import TokenizerView
    from cdm_toolkit.vocab_map.stats import Coverage
    from cdm_toolkit.vocab_map.types import Neighbours, NeighbourTable, VocabMap

app = typer.Typer(
    no_args_is_help=True, help="Map a teacher's vocabulary to a student's: build, inspect, export."
)

STRATEGIES = ("contextual", "exact", "min-ed", "prefix")

_option = functools.partial(record_option, "artifacts/maps.py", "MapSettings")
Strategy = Annotated[str | None, _option("strategy")]
MaxEditDistance = Annotated[float | None, _option("max_edit_distance")]
MatchDigits = Annotated[bool | None, _option("match_digits", "--match-digits/--no-match-digits")]
Workers = Annotated[int | None, _option("workers")]


@app.command()
def build(
    context: typer.Context,
    t1: options.Teacher,
    t2: options.Student,
    max_edit_distance: MaxEditDistance = None,
    match_digits: MatchDigits = None,
    workers: Workers = None,
) -> None:
    """Build the neighbour table of two vocabularies, and store it in the cache for later runs.

    Example: cdm vocab-map build --t1 llama3 --t2 qwen2
    """
    table = neighbours(*_views(t1, t2), _settings(context))
    screen.line(
        f"{len(table.t_to_s.ids):,} near tokens from {t1} to {t2}, {len(table.s_to_t.ids):,} back, "
        f"max_edit_distance {table.max_edit_distance}"
    )


@app.command()
def export(
    context: typer.Context,
    t1: options.Teacher,
    t2: options.Student,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    strategy: Strategy = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="safetensors, json, csv, parquet or npy; by default the file's extension."
        ),
    ] = None,
    max_edit_distance: MaxEditDistance = None,
    match_digits: MatchDigits = None,
    workers: Workers = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a mapping from the teacher's ids (--t1) to the student's (--t2), and print its coverage.

    Example: cdm vocab-map export --t1 smollm2 --t2 mistral -o map.safetensors
    """
    from cdm_toolkit.artifacts.exports import FILE_FORMATS, export_map

    file_format = file_format or output.suffix.removeprefix(".")
    if file_format not in FILE_FORMATS:
        raise UnknownName("format", file_format, FILE_FORMATS)
    if output.exists() and not overwrite:
        raise FileProblem(output, "is there already", "give --overwrite to replace it, or another --output")
    view_t, view_s = _views(t1, t2)
    mapping = build_map(view_t, view_s, _settings(context))
    files = export_map(output, mapping, view_t, view_s, file_format=file_format)
    if as_json:
        screen.print_json(
            {
                "files": [str(file) for file in files],
                "strategy": mapping.strategy,
                "size_t": mapping.size_t,
                "matched": int(mapping.matched.sum()),
                "coverage": mapping.coverage,
                "entries": len(mapping.ids),
            }
        )
        return
    print_coverage(mapping, view_t)
    screen.say(f"wrote {' and '.join(str(file) for file in files)}")


@app.command()
def show(
    context: typer.Context,
    token: Annotated[str, typer.Argument(help="A token's id, or its text, including a leading space.")],
    t1: options.Teacher,
    t2: options.Student,
    max_edit_distance: MaxEditDistance = None,
    match_digits: MatchDigits = None,
    limit: Annotated[int, typer.Option(help="Near tokens to list in each direction.", min=1)] = 20,
    workers: Workers = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the matches of a token: its exact partner, and its near tokens in both directions.

    Example: cdm vocab-map show " tokenizer" --t1 smollm2 --t2 mistral
    """
    from cdm_toolkit.cli.visible import token_label
    from cdm_toolkit.vocab_map.exact import build_exact

    view_t, view_s = _views(t1, t2)
    token_id = find_token(view_t, token)
    exact = [other for other, _ in build_exact(view_t, view_s).row(token_id)]
    table = neighbours(view_t, view_s, _settings(context))
    near, back = table.t_to_s.row(token_id)[:limit], _rows_containing(table.s_to_t, token_id)[:limit]
    if as_json:

        def listed(entries: list[tuple[int, float]]) -> list[dict[str, object]]:
            return [{"id": i, "text": view_s.token_text(i), "distance": round(d, 4)} for i, d in entries]

        screen.print_json(
            {"id": token_id, "text": view_t.token_text(token_id), "exact": next(iter(exact), None)}
            | {"near": listed(near), "near_of": listed(back)}
        )
        return
    rows = [("exact", other, 0.0) for other in exact]
    rows += [(f"near, {t1} to {t2}", *entry) for entry in near]
    rows += [(f"near, {t2} to {t1}", *entry) for entry in back]
    screen.print_table(
        f"{token_label(view_t, token_id)} ({token_id} of {t1})",
        ("match", "token", "id", "distance"),
        ((kind, token_label(view_s, i), f"{i}", f"{distance:.3f}") for kind, i, distance in rows),
        right=("id", "distance"),
    )
    if not rows:
        screen.line(f"no token of {t2} is within max_edit_distance {table.max_edit_distance}")


@app.command()
def stats(
    context: typer.Context,
    t1: options.Teacher,
    t2: options.Student,
    strategy: Strategy = None,
    max_edit_distance: MaxEditDistance = None,
    match_digits: MatchDigits = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="JSONL or text file: also print the share of its tokens that have a match."),
    ] = None,
    teacher: Annotated[
        str | None, options.model("Also print the matched mass of a model on --data, by strategy")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL or text file that the teacher reads.")] = None,
    limit: Annotated[int, typer.Option(help="Rows of --data that the teacher reads.", min=1)] = 50,
    device: options.Device = "auto",
    html: Annotated[Path | None, typer.Option(help="Write the figures as a page for a browser.")] = None,
    workers: Workers = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the coverage of a mapping: by ids, by class, by frequency in a corpus, by a teacher's probability.

    Example: cdm vocab-map stats --t1 smollm2 --t2 mistral --teacher smollm2 --data rows.jsonl
    """
    from cdm_toolkit.vocab_map.stats import coverage_by_frequency

    if (teacher is None) != (data is None):
        raise typer.BadParameter("--teacher and --data go together.")
    counted = read_corpus(corpus) if corpus else None
    read = read_corpus(data)[:limit] if data else None
    view_t, view_s = _views(t1, t2)
    settings = _settings(context)
    mapping = build_map(view_t, view_s, settings)
    in_corpus = coverage_by_frequency(mapping, token_counts(view_t, counted)) if counted else None
    mass = _mass(teacher, view_t, view_s, read, settings, device) if teacher and read else None
    if html:
        write_page(html, _stats_page(mapping, view_t, in_corpus, mass))
        screen.say(f"wrote {html}")
    if as_json:
        screen.print_json(_stats_record(mapping, view_t, in_corpus, mass))
        return
    print_coverage(mapping, view_t)
    if in_corpus:
        screen.line(_of_corpus(in_corpus))
    if mass:
        rows = ((name, f"{share:.4f}") for name, share in mass.items())
        title = f"probability of {teacher} that is matched"
        screen.print_table(title, ("strategy", "mass"), rows, right=("mass",))


def _views(t1: str, t2: str) -> tuple[TokenizerView, TokenizerView]:
    from cdm_toolkit.hub.tokenizers import load_view

    return load_view(t1), load_view(t2)


def _settings(context: typer.Context) -> MapSettings:
    from cdm_toolkit.artifacts.maps import MapSettings

    return MapSettings(**given(context, "artifacts/maps.py", "MapSettings"))


def find_token(view: TokenizerView, token: str) -> int:
    """Find an id by its number, else by its text. Raises UnknownTokenId, BadOption."""
    data = token.encode("utf-8", "surrogateescape")
    if token.isdigit():
        if int(token) >= view.vocab_size:
            raise UnknownTokenId(view.name, int(token), view.vocab_size)
        return int(token)
    if data in view.literals:
        return view.literals.index(data)
    cut = ", ".join(repr(view.token_text(int(i))) for i in view.encode(token).ids[:6])
    raise BadOption("the token", token, f"an id or one token of {view.name}, which cuts this into {cut}")


def token_counts(view: TokenizerView, texts: list[str]) -> Int64[np.ndarray, " vocab"]:
    """Count how often each id stands in texts."""
    import numpy as np

    ids = np.concatenate([spans.ids for spans in view.encode_batch(texts)])
    return np.bincount(ids, minlength=view.vocab_size)


def _rows_containing(neighbours: Neighbours, token_id: int) -> list[tuple[int, float]]:
    """List the rows that contain an id, nearest first."""
    import numpy as np

    entries = np.flatnonzero(neighbours.ids == token_id)
    rows = np.searchsorted(neighbours.indptr, entries, side="right") - 1
    order = np.argsort(neighbours.rank[entries], kind="stable")
    return list(zip(rows[order].tolist(), neighbours.distance[entries][order].tolist(), strict=True))


def _mass(
    teacher: str,
    view_t: TokenizerView,
    view_s: TokenizerView,
    texts: list[str],
    settings: MapSettings,
    device: str,
) -> dict[str, float]:

    from cdm_toolkit.distill.coverage import mass_by_strategy
    from cdm_toolkit.hub.models import load_model, resolve_device
    from cdm_toolkit.hub.tokenizers import load_view
    from cdm_toolkit.vocab_map.stats import matchable_by_strategy

    own = load_view(teacher)
    if own.fingerprint != view_t.fingerprint:
        built_for, given = (view_t.name, view_t.fingerprint), (own.name, own.fingerprint)
        fix = f"give the teacher's own tokenizer: --t1 {teacher}"
        raise TokenizerMismatch("the mapping", "teacher", built_for, given, fix)
    exact, min_ed, prefix = (
        build_map(view_t, view_s, replace(settings, strategy=strategy))
        for strategy in ("exact", "min-ed", "prefix")
    )
    reached = matchable_by_strategy(exact, min_ed, prefix, neighbours(view_t, view_s, settings))
    device = str(resolve_device(device))
    model = load_model(teacher, device=device)
    screen.say_device(device)
    with screen.counted(f"{teacher} reads") as progress:
        return mass_by_strategy(
            model, view_t, texts, reached, on_text=lambda done: progress(done, len(texts))
        )


def _stats_record(
    mapping: VocabMap, view_t: TokenizerView, in_corpus: Coverage | None, mass: dict[str, float] | None
) -> dict[str, Any]:
    from cdm_toolkit.vocab_map.stats import coverage_by_class, coverage_by_ids

    def part(coverage: Coverage) -> dict[str, Any]:
        return asdict(coverage) | {"share": coverage.share}

    return {
        "t1": mapping.name_t,
        "t2": mapping.name_s,
        "strategy": mapping.strategy,
        "max_edit_distance": mapping.max_edit_distance,
        "ids": part(coverage_by_ids(mapping)),
        "classes": {name: part(coverage) for name, coverage in coverage_by_class(mapping, view_t).items()},
        "corpus": part(in_corpus) if in_corpus else None,
        "mass": mass,
    }


def _stats_page(
    mapping: VocabMap, view_t: TokenizerView, in_corpus: Coverage | None, mass: dict[str, float] | None
) -> str:
    from cdm_toolkit.cli.align_page import KINDS
    from cdm_toolkit.vocab_map.stats import coverage_by_class, coverage_by_ids

    whole, classes = coverage_by_ids(mapping), coverage_by_class(mapping, view_t)
    about = f"{whole.matched:,} of {whole.total:,} ids have a match, {len(mapping.ids):,} entries"
    if mapping.max_edit_distance is not None:
        about += f", max_edit_distance {mapping.max_edit_distance}"
    return render(
        "coverage.html.j2",
        title=f"{mapping.name_t} to {mapping.name_s}, {mapping.strategy}",
        about=about,
        kinds=KINDS,
        mass=[(name, share, f"{share:.4f}") for name, share in (mass or {}).items()],
        shares=[(name, part.share, f"{part.share:.1%} of {part.total:,}") for name, part in classes.items()],
        classes=list(_coverage_rows(classes)),
        corpus=in_corpus and _of_corpus(in_corpus),
    )


def _of_corpus(coverage: Coverage) -> str:
    return f"Of the corpus's {coverage.total:,} tokens {coverage.share:.2%} have a match."


def _coverage_rows(parts: dict[str, Coverage]) -> Iterator[tuple[str, ...]]:
    for name, part in parts.items():
        yield name, f"{part.matched:,}", f"{part.total:,}", f"{part.share:.1%}"


def build_map(view_t: TokenizerView, view_s: TokenizerView, settings: MapSettings) -> VocabMap:
    """Build a static map under a progress bar. Raises UnknownName, BadOption."""
    from cdm_toolkit.vocab_map.contextual_map import build_contextual_map
    from cdm_toolkit.vocab_map.exact import build_exact
    from cdm_toolkit.vocab_map.min_ed import build_min_ed
    from cdm_toolkit.vocab_map.prefix import build_prefix

    match settings.strategy:
        case "exact":
            return build_exact(view_t, view_s)
        case "prefix":
            return build_prefix(view_t, view_s)
        case "min-ed":
            with screen.counted("nearest tokens") as progress:
                return build_min_ed(
                    view_t,
                    view_s,
                    match_digits=settings.match_digits,
                    workers=settings.workers,
                    progress=progress,
                )
        case "contextual":
            return build_contextual_map(build_exact(view_t, view_s), neighbours(view_t, view_s, settings))
    raise UnknownName("strategy", settings.strategy, STRATEGIES)


def neighbours(view_t: TokenizerView, view_s: TokenizerView, settings: MapSettings) -> NeighbourTable:
    """Read the neighbour table from the cache, or build it under a progress bar."""
    from cdm_toolkit.artifacts.maps import load_or_build_neighbours

    with screen.counted("near tokens") as progress:
        return load_or_build_neighbours(
            view_t,
            view_s,
            max_edit_distance=settings.max_edit_distance,
            match_digits=settings.match_digits,
            workers=settings.workers,
            progress=progress,
        )


def print_coverage(mapping: VocabMap, view_t: TokenizerView) -> None:
    """Print which share of the teacher's ids has a match, by class of token."""
    from cdm_toolkit.vocab_map.stats import coverage_by_class, coverage_by_ids

    classes = list(coverage_by_class(mapping, view_t).items())[:12]
    figures = ("matched", "of", "share")
    screen.print_table(
        f"{mapping.strategy}: {mapping.name_t} → {mapping.name_s}, {len(mapping.ids):,} entries",
        ("class of token", *figures),
        _coverage_rows(dict([*classes, ("all", coverage_by_ids(mapping))])),
        right=figures,
    )
