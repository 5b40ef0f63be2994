"""`cdm align`: align the tokens of two tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdm_toolkit.cli import options, screen
from cdm_toolkit.cli.corpus_file import read_corpus
from cdm_toolkit.errors import UnknownName
from cdm_toolkit.pages import write_page

if TYPE_CHECKING:
    from cdm_toolkit.alignment.aligners import TextAlignment
    from cdm_toolkit.tokdiff.spans import TokenSpans

ENTROPIES = ("uniform", "models")

CorpusFile = Annotated[Path, typer.Argument(help="A JSONL file, or a text file with one text per line.")]

app = typer.Typer(no_args_is_help=True, help="Align the tokens of two tokenizers on the same text.")


@app.command()
def show(
    t1: options.FirstTokenizer,
    t2: options.SecondTokenizer,
    text: Annotated[
        str | None, typer.Argument(help="The text to align. With --chat: messages as JSON.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Align each line of a text file, or each row of a JSONL file, instead."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Render messages with each tokenizer's chat template, and align the results."
        ),
    ] = False,
    aligner: options.Aligner = "anchored",
    entropy: Annotated[
        str,
        typer.Option(
            help="Token weights in DTW: uniform, or models (next-token entropies; --t1 and --t2 must be models)."
        ),
    ] = "uniform",
    device: options.Device = "auto",
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Include the special tokens that each tokenizer adds, such as bos."
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write the alignment as an HTML page.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the alignment as an SVG image.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the tokens of both tokenizers in two rows, grouped by shared byte boundaries.

    Example: cdm align show "Tokens don't match 1:1" --t1 smollm2 --t2 mistral
    """
    from cdm_toolkit.cli.align_page import alignment_page, alignment_svg
    from cdm_toolkit.cli.align_rows import draw_rows

    if (text is None) == (file is None):
        raise typer.BadParameter("give a text, or --file, and not both.")
    if chat:
        aligned = _aligned_chats(t1, t2, text, file)
    else:
        texts = read_corpus(file) if file else [text or ""]
        aligned = _aligned_texts(
            t1, t2, texts, aligner=aligner, special_tokens=special_tokens, entropy=entropy, device=device
        )
    if svg and len(aligned) != 1:
        raise typer.BadParameter(f"a picture holds one text, and the file has {len(aligned)}; use --html.")
    if html:
        write_page(html, alignment_page(aligned, source=str(file) if file else "one text"))
        screen.say(f"wrote {html}")
    if svg:
        write_page(svg, alignment_svg(aligned[0]))
        screen.say(f"wrote {svg}")
    if as_json:
        for each in aligned:
            screen.print_json(alignment_record(each))
    elif not html and not svg:
        console = screen.out()
        for each in aligned:
            for line in draw_rows(each, width=console.width):
                console.print(line, no_wrap=True, overflow="ignore", crop=False)
            screen.line(_summary(each))


@app.command()
def report(
    file: CorpusFile,
    t1: options.FirstTokenizer,
    t2: options.SecondTokenizer,
    aligner: options.Aligner = "anchored",
    worst: Annotated[int, typer.Option(help="How many texts with the least agreement to list.", min=0)] = 5,
    workers: options.Workers = 2,
    html: Annotated[Path | None, typer.Option(help="Write the report as an HTML page.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Summarise the alignment of a corpus: kinds of groups, boundary agreement, normalized bytes, worst texts.

    Example: cdm align report gsm8k_test.jsonl --t1 llama3 --t2 qwen2
    """
    from cdm_toolkit.cli import report as rendering

    texts = read_corpus(file)
    found = rendering.run_report(t1, t2, texts, aligner=aligner, workers=workers)
    if html:
        write_page(html, rendering.report_page(found, texts, source=str(file), worst=worst))
        screen.say(f"wrote {html}")
    if as_json:
        screen.print_json(rendering.report_record(found, worst=worst))
    else:
        rendering.print_report(found, texts, worst=worst)


@app.command()
def export(
    file: CorpusFile,
    t1: options.FirstTokenizer,
    t2: options.SecondTokenizer,
    output: options.OutputFolder,
    aligner: options.Aligner = "anchored",
    file_format: Annotated[str, typer.Option("--format", help="parquet or arrow.")] = "parquet",
    overwrite: options.Overwrite = False,
) -> None:
    """Write the tokens and groups of every text of a corpus as a parquet or arrow table.

    Example: cdm align export gsm8k_test.jsonl --t1 llama3 --t2 qwen2 -o aligned
    """
    from cdm_toolkit.artifacts.alignments import write_alignments
    from cdm_toolkit.hub.align_corpus import align_corpus
    from cdm_toolkit.hub.tokenizers import load_view

    texts = read_corpus(file)
    view_t, view_s = load_view(t1), load_view(t2)
    with screen.progress() as bar:
        task = bar.add_task("aligning", total=len(texts), note="")
        written = write_alignments(
            output,
            bar.track(align_corpus(view_t, view_s, texts, aligner=aligner), task_id=task, total=len(texts)),
            sides=(view_t, view_s),
            aligner=aligner,
            file_format=file_format,
            overwrite=overwrite,
        )
    screen.line(f"{written}: {len(texts):,} texts")


def _aligned_texts(
    t1: str, t2: str, texts: list[str], *, aligner: str, special_tokens: bool, entropy: str, device: str
) -> list[TextAlignment]:
    from cdm_toolkit.alignment.aligners import TextAlignment, align, align_text, require_known
    from cdm_toolkit.hub.tokenizers import load_view

    require_known(aligner)
    if entropy not in ENTROPIES:
        raise UnknownName("entropy", entropy, ENTROPIES)
    view_t, view_s = load_view(t1), load_view(t2)
    if entropy == "uniform":
        return [
            align_text(view_t, view_s, text, aligner=aligner, add_special_tokens=special_tokens)
            for text in texts
        ]
    from cdm_toolkit.hub.models import load_model, resolve_device
    from cdm_toolkit.hub.token_entropies import token_entropies

    device = str(resolve_device(device))
    model_t, model_s = load_model(t1, device=device), load_model(t2, device=device)
    screen.say_device(device)
    aligned = []
    for text in texts:
        t, s = (view.encode(text, add_special_tokens=special_tokens) for view in (view_t, view_s))
        entropies = {"entropy_t": token_entropies(model_t, t), "entropy_s": token_entropies(model_s, s)}
        aligned.append(TextAlignment(t, s, align(t, s, aligner=aligner, **entropies)))
    return aligned


def _aligned_chats(t1: str, t2: str, text: str | None, file: Path | None) -> list[TextAlignment]:
    from cdm_toolkit.distill.jsonl import parse_messages, read_messages
    from cdm_toolkit.kd.pair import TokenizerPair

    chats = read_messages(file) if file else [parse_messages(text or "")]
    pair = TokenizerPair.from_names(t1, t2)
    return [pair.align_chat(messages) for messages in chats]


def _summary(aligned: TextAlignment) -> str:
    counts = aligned.alignment.kind_counts()
    kinds = ", ".join(f"{count} × {kind}" for kind, count in counts.items() if count)
    inexact = len(aligned.alignment) - int(aligned.alignment.exact.sum())
    spelled = "all exact" if inexact == 0 else f"{inexact} not exact"
    return (
        f"{len(aligned.t.ids)} and {len(aligned.s.ids)} tokens in {len(aligned.alignment)} groups"
        f"{f' ({kinds})' if kinds else ''}, {spelled}"
    )


def alignment_record(aligned: TextAlignment) -> dict[str, Any]:
    """Convert an alignment for JSON: tokens of both sides with byte spans, groups as half-open token ranges."""
    return {
        "t1": _side_record(aligned.t),
        "t2": _side_record(aligned.s),
        "groups": [
            {"t1": [g.t0, g.t1], "t2": [g.s0, g.s1], "kind": g.kind, "exact": g.exact}
            for g in aligned.alignment
        ],
    }


def _side_record(spans: TokenSpans) -> dict[str, Any]:
    columns = zip(
        spans.ids.tolist(), spans.start.tolist(), spans.end.tolist(), spans.special.tolist(), strict=True
    )
    return {
        "name": spans.view.name,
        "tokens": [
            {"id": i, "text": spans.view.token_text(i), "start": start, "end": end, "special": special}
            for i, start, end, special in columns
        ],
    }
