"""`cdm vocab-map`: map a teacher's vocabulary to a student's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdm_toolkit.cli import completion, options

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int64

    from cdm_toolkit.tokdiff.view import TokenizerView
    from cdm_toolkit.vocab_map.stats import Coverage
    from cdm_toolkit.vocab_map.types import Neighbours, NeighbourTable, VocabMap

app = typer.Typer(
    no_args_is_help=True, help="Map a teacher's vocabulary to a student's: build, inspect, export."
)

STRATEGIES = ("contextual", "exact", "min-ed", "prefix")

Strategy = Annotated[
    str,
    typer.Option(
        help="contextual: equal bytes, else all near tokens. exact: only equal bytes. min-ed: the nearest by edit "
        "distance. prefix: the longest student token that is a prefix of the teacher's."
    ),
]
MaxEditDistance = Annotated[
    float, typer.Option(help="Near tokens have an edit distance below this fraction of their total length.")
]
MatchDigits = Annotated[
    bool,
    typer.Option(
        "--match-digits/--no-match-digits", help="Only match tokens with equal digits and operators."
    ),
]


@app.command()
def build(
    t1: options.Teacher,
    t2: options.Student,
    max_edit_distance: MaxEditDistance = 0.3,
    match_digits: MatchDigits = True,
    workers: options.Workers = 2,
) -> None:
    """Build the neighbour table of two vocabularies, and store it in the cache for later runs.

    Example: cdm vocab-map build --t1 llama3 --t2 qwen2
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.hub.tokenizers import load_view

    table = neighbours(
        load_view(t1),
        load_view(t2),
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
        workers=workers,
    )
    screen.out().print(
        f"{len(table.t_to_s.ids):,} near tokens from {t1} to {t2}, {len(table.s_to_t.ids):,} back, "
        f"max_edit_distance {max_edit_distance}",
        markup=False,
        soft_wrap=True,
    )


@app.command()
def export(
    t1: options.Teacher,
    t2: options.Student,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    strategy: Strategy = "contextual",
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="safetensors, json, csv, parquet or npy; by default the file's extension."
        ),
    ] = None,
    max_edit_distance: MaxEditDistance = 0.3,
    match_digits: MatchDigits = True,
    workers: options.Workers = 2,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a mapping from the teacher's ids (--t1) to the student's (--t2), and print its coverage.

    Example: cdm vocab-map export --t1 smollm2 --t2 mistral -o map.safetensors
    """
    from cdm_toolkit.artifacts.exports import FILE_FORMATS, export_map
    from cdm_toolkit.artifacts.provenance import provenance
    from cdm_toolkit.cli import screen
    from cdm_toolkit.errors import FileProblem, UnknownName
    from cdm_toolkit.hub.tokenizers import load_view

    file_format = file_format or output.suffix.removeprefix(".")
    if file_format not in FILE_FORMATS:
        raise UnknownName("format", file_format, FILE_FORMATS)
    if output.exists() and not overwrite:
        raise FileProblem(output, "is there already", "give --overwrite to replace it, or another --output")
    view_t, view_s = load_view(t1), load_view(t2)
    mapping = build_map(
        view_t,
        view_s,
        strategy,
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
        workers=workers,
    )
    fingerprints = {"teacher": view_t.fingerprint, "student": view_s.fingerprint}
    files = export_map(
        output,
        mapping,
        view_t,
        view_s,
        file_format=file_format,
        made_by=provenance(fingerprints=fingerprints),
    )
    if as_json:
        screen.print_json(
            {"files": [str(file) for file in files], "strategy": strategy, "size_t": mapping.size_t}
            | {
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
    token: Annotated[str, typer.Argument(help="A token's id, or its text, including a leading space.")],
    t1: options.Teacher,
    t2: options.Student,
    max_edit_distance: MaxEditDistance = 0.3,
    match_digits: MatchDigits = True,
    limit: Annotated[int, typer.Option(help="Near tokens to list in each direction.", min=1)] = 20,
    workers: options.Workers = 2,
    as_json: options.AsJson = False,
) -> None:
    """Show the matches of a token: its exact partner, and its near tokens in both directions.

    Example: cdm vocab-map show " tokenizer" --t1 smollm2 --t2 mistral
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.cli.visible import token_label
    from cdm_toolkit.hub.tokenizers import load_view
    from cdm_toolkit.vocab_map.exact import build_exact

    view_t, view_s = load_view(t1), load_view(t2)
    token_id = find_token(view_t, token)
    partner = build_exact(view_t, view_s).row(token_id)
    table = neighbours(
        view_t, view_s, max_edit_distance=max_edit_distance, match_digits=match_digits, workers=workers
    )
    near = table.t_to_s.row(token_id)[:limit]
    back = [(other, distance) for other, distance in _rows_containing(table.s_to_t, token_id)][:limit]
    if as_json:

        def listed(entries: list[tuple[int, float]]) -> list[dict[str, object]]:
            return [{"id": i, "text": view_s.token_text(i), "distance": round(d, 4)} for i, d in entries]

        screen.print_json(
            {"id": token_id, "text": view_t.token_text(token_id), "exact": partner[0][0] if partner else None}
            | {"near": listed(near), "near_of": listed(back)}
        )
        return
    shown = screen.table(
        f"{token_label(view_t, token_id)} ({token_id} of {t1})",
        "match",
        "token",
        "id",
        "distance",
        right=("id", "distance"),
    )
    rows = [("exact", other, 0.0) for other, _ in partner]
    rows += [(f"near, {t1} to {t2}", *entry) for entry in near]
    rows += [(f"near, {t2} to {t1}", *entry) for entry in back]
    for kind, other, distance in rows:
        shown.add_row(kind, token_label(view_s, other), f"{other}", f"{distance:.3f}")
    console = screen.out()
    console.print(shown, markup=False)
    if not rows:
        console.print(f"no token of {t2} is within max_edit_distance {max_edit_distance}", markup=False)


@app.command()
def stats(
    t1: options.Teacher,
    t2: options.Student,
    strategy: Strategy = "contextual",
    max_edit_distance: MaxEditDistance = 0.3,
    match_digits: MatchDigits = True,
    corpus: Annotated[
        Path | None,
        typer.Option(help="JSONL or text file: also print the share of its tokens that have a match."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A model: also print its matched mass on --data, by strategy.",
            autocompletion=completion.models,
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL or text file that the teacher reads.")] = None,
    limit: Annotated[int, typer.Option(help="Rows of --data that the teacher reads.", min=1)] = 50,
    device: options.Device = "auto",
    html: Annotated[Path | None, typer.Option(help="Write the figures as a page for a browser.")] = None,
    workers: options.Workers = 2,
    as_json: options.AsJson = False,
) -> None:
    """Print the coverage of a mapping: by ids, by class, by frequency in a corpus, by a teacher's probability.

    Example: cdm vocab-map stats --t1 smollm2 --t2 mistral --teacher smollm2 --data rows.jsonl
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.cli.corpus_file import read_corpus
    from cdm_toolkit.hub.tokenizers import load_view
    from cdm_toolkit.pages import write_page
    from cdm_toolkit.vocab_map.stats import coverage_by_frequency

    if (teacher is None) != (data is None):
        raise typer.BadParameter("--teacher and --data go together.")
    counted = read_corpus(corpus) if corpus else None
    read = read_corpus(data)[:limit] if data else None
    view_t, view_s = load_view(t1), load_view(t2)
    mapping = build_map(
        view_t,
        view_s,
        strategy,
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
        workers=workers,
    )
    by_frequency = coverage_by_frequency(mapping, token_counts(view_t, counted)) if counted else None
    mass = None
    if teacher and read:
        mass = _mass(
            teacher,
            view_t,
            view_s,
            read,
            max_edit_distance=max_edit_distance,
            match_digits=match_digits,
            workers=workers,
            device=device,
        )
    if html:
        write_page(html, _stats_page(mapping, view_t, by_frequency, mass))
        screen.say(f"wrote {html}")
    if as_json:
        screen.print_json(_stats_record(mapping, view_t, by_frequency, mass))
        return
    print_coverage(mapping, view_t)
    console = screen.out()
    if by_frequency:
        console.print(f"of the corpus's {by_frequency.total:,} tokens {by_frequency.share:.2%} have a match")
    if mass:
        shown = screen.table(f"probability of {teacher} that is matched", "strategy", "mass", right=("mass",))
        for name, share in mass.items():
            shown.add_row(name, f"{share:.4f}")
        console.print(shown)


def find_token(view: TokenizerView, token: str) -> int:
    """Find an id by its number, else by its text. Raises UnknownTokenId, BadOption."""
    from cdm_toolkit.errors import BadOption, UnknownTokenId

    data = token.encode("utf-8", "surrogateescape")
    found = [i for i, literal in enumerate(view.literals) if literal == data]
    if found and not token.isdigit():
        return found[0]
    if token.isdigit():
        if int(token) >= view.vocab_size:
            raise UnknownTokenId(view.name, int(token), view.vocab_size)
        return int(token)
    cut = ", ".join(repr(view.token_text(int(i))) for i in view.encode(token).ids[:6])
    raise BadOption("the token", token, f"an id or one token of {view.name}, which cuts this into {cut}")


def token_counts(view: TokenizerView, texts: list[str]) -> Int64[np.ndarray, " vocab"]:
    """Count how often each id stands in texts."""
    import numpy as np

    counts = np.zeros(view.vocab_size, np.int64)
    for spans in view.encode_batch(texts):
        counts += np.bincount(spans.ids, minlength=view.vocab_size)
    return counts


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
    *,
    max_edit_distance: float,
    match_digits: bool,
    workers: int,
    device: str,
) -> dict[str, float]:
    from cdm_toolkit.cli import screen
    from cdm_toolkit.distill.coverage import mass_by_strategy
    from cdm_toolkit.errors import TokenizerMismatch
    from cdm_toolkit.hub.models import load_model, resolve_device
    from cdm_toolkit.hub.tokenizers import load_view
    from cdm_toolkit.vocab_map.stats import matchable_by_strategy

    own = load_view(teacher)
    if own.fingerprint != view_t.fingerprint:
        raise TokenizerMismatch(
            "the mapping",
            "teacher",
            (view_t.name, view_t.fingerprint),
            (own.name, own.fingerprint),
            f"give the teacher's own tokenizer: --t1 {teacher}",
        )
    maps = {
        name: build_map(
            view_t,
            view_s,
            name,
            max_edit_distance=max_edit_distance,
            match_digits=match_digits,
            workers=workers,
        )
        for name in ("exact", "min-ed", "prefix")
    }
    table = neighbours(
        view_t, view_s, max_edit_distance=max_edit_distance, match_digits=match_digits, workers=workers
    )
    device = str(resolve_device(device))
    model = load_model(teacher, device=device)
    screen.say_device(device)
    with screen.progress() as bar:
        task = bar.add_task(f"{teacher} reads", total=len(texts), note="")
        mass: dict[str, float] = mass_by_strategy(
            model,
            view_t,
            texts,
            matchable_by_strategy(maps["exact"], maps["min-ed"], maps["prefix"], table),
            on_text=lambda done: bar.update(task, completed=done),
        )
    return mass


def _stats_record(
    mapping: VocabMap, view_t: TokenizerView, by_frequency: Coverage | None, mass: dict[str, float] | None
) -> dict[str, Any]:
    from cdm_toolkit.vocab_map.stats import coverage_by_class, coverage_by_ids

    def part(coverage: Coverage) -> dict[str, Any]:
        return {"matched": coverage.matched, "total": coverage.total, "share": coverage.share}

    return {
        "t1": mapping.name_t,
        "t2": mapping.name_s,
        "strategy": mapping.strategy,
        "max_edit_distance": mapping.max_edit_distance,
        "ids": part(coverage_by_ids(mapping)),
        "classes": {name: part(coverage) for name, coverage in coverage_by_class(mapping, view_t).items()},
        "corpus": part(by_frequency) if by_frequency else None,
        "mass": mass,
    }


def _stats_page(
    mapping: VocabMap, view_t: TokenizerView, by_frequency: Coverage | None, mass: dict[str, float] | None
) -> str:
    from cdm_toolkit.cli.align_page import KINDS
    from cdm_toolkit.pages import render
    from cdm_toolkit.vocab_map.stats import coverage_by_class, coverage_by_ids

    whole, classes = coverage_by_ids(mapping), coverage_by_class(mapping, view_t)
    about = f"{whole.matched:,} of {whole.total:,} ids have a match, {len(mapping.ids):,} entries"
    if mapping.max_edit_distance is not None:
        about += f", max_edit_distance {mapping.max_edit_distance}"
    corpus = by_frequency and (
        f"Of the corpus's {by_frequency.total:,} tokens {by_frequency.share:.2%} have a match."
    )
    return render(
        "coverage.html.j2",
        title=f"{mapping.name_t} to {mapping.name_s}, {mapping.strategy}",
        about=about,
        kinds=KINDS,
        mass=[(name, share, f"{share:.4f}") for name, share in (mass or {}).items()],
        shares=[(name, part.share, f"{part.share:.1%} of {part.total:,}") for name, part in classes.items()],
        classes=[
            (name, f"{part.matched:,}", f"{part.total:,}", f"{part.share:.1%}")
            for name, part in classes.items()
        ],
        corpus=corpus,
    )


def build_map(
    view_t: TokenizerView,
    view_s: TokenizerView,
    strategy: str,
    *,
    max_edit_distance: float,
    match_digits: bool,
    workers: int,
) -> VocabMap:
    """Build a static map by name. Raises UnknownName, BadOption."""
    from cdm_toolkit.cli import screen
    from cdm_toolkit.errors import UnknownName
    from cdm_toolkit.vocab_map.contextual_map import build_contextual_map
    from cdm_toolkit.vocab_map.exact import build_exact
    from cdm_toolkit.vocab_map.min_ed import build_min_ed
    from cdm_toolkit.vocab_map.prefix import build_prefix

    if strategy == "exact":
        return build_exact(view_t, view_s)
    if strategy == "prefix":
        return build_prefix(view_t, view_s)
    if strategy == "min-ed":
        with screen.progress() as bar:
            task = bar.add_task("nearest tokens", total=None, note="")
            return build_min_ed(
                view_t,
                view_s,
                match_digits=match_digits,
                workers=workers,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    if strategy != "contextual":
        raise UnknownName("strategy", strategy, STRATEGIES)
    table = neighbours(
        view_t, view_s, max_edit_distance=max_edit_distance, match_digits=match_digits, workers=workers
    )
    return build_contextual_map(build_exact(view_t, view_s), table)


def neighbours(
    view_t: TokenizerView,
    view_s: TokenizerView,
    *,
    max_edit_distance: float,
    match_digits: bool,
    workers: int,
) -> NeighbourTable:
    """Read the neighbour table from the cache, or build it under a progress bar."""
    from cdm_toolkit.artifacts.maps import load_or_build_neighbours
    from cdm_toolkit.cli import screen

    with screen.progress() as bar:
        task = bar.add_task("near tokens", total=None, note="")
        return load_or_build_neighbours(
            view_t,
            view_s,
            max_edit_distance=max_edit_distance,
            match_digits=match_digits,
            workers=workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def print_coverage(mapping: VocabMap, view_t: TokenizerView) -> None:
    """Print which share of the teacher's ids has a match, by class of token."""
    from cdm_toolkit.cli import screen
    from cdm_toolkit.vocab_map.stats import coverage_by_class, coverage_by_ids

    whole = coverage_by_ids(mapping)
    shown = screen.table(
        f"{mapping.strategy}: {mapping.name_t} → {mapping.name_s}, {len(mapping.ids):,} entries",
        "class of token",
        "matched",
        "of",
        "share",
        right=("matched", "of", "share"),
    )
    classes = list(coverage_by_class(mapping, view_t).items())
    for name, part in [*classes[:12], ("all", whole)]:
        shown.add_row(name, f"{part.matched:,}", f"{part.total:,}", f"{part.share:.1%}")
    screen.out().print(shown)
