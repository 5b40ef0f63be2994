"""How two tokenizers cut a corpus: measured, on a terminal, as data, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cdm_toolkit.alignment.statistics import PairStatistics, Tally
from cdm_toolkit.cli import screen
from cdm_toolkit.cli.visible import visible
from cdm_toolkit.hub import align_corpus
from cdm_toolkit.hub.align_corpus import CorpusReport
from cdm_toolkit.tokdiff.changes import Change

SHOWN = 70  # characters of a text, and changes of a tokenizer, that a report quotes
CHANGES = 5


def run_report(t1: str, t2: str, texts: Sequence[str], *, aligner: str, workers: int) -> CorpusReport:
    """Report on a corpus under a progress bar."""
    with screen.counted("aligning") as progress:
        return align_corpus.report(t1, t2, texts, aligner=aligner, workers=workers, progress=progress)


def print_report(found: CorpusReport, texts: Sequence[str], *, worst: int) -> None:
    """Print the report as tables."""
    print_statistics(*found.names, found.total)
    for line in (_verdict(found), *_change_lines(found)):
        screen.line(line)
    if rows := _worst_rows(found, texts, worst):
        screen.print_table("Texts cut most differently", _WORST, rows, right=_WORST[:-1])


def print_statistics(name_a: str, name_b: str, measured: PairStatistics) -> None:
    """Print how two tokenizers cut a corpus, by class of text."""
    figures = ("bytes", f"B/token {name_a}", f"B/token {name_b}", "1-1", "1-n", "n-1", "n-m")
    title = f"{measured.texts:,} texts, boundaries agree {measured.agreement:.1%}"
    screen.print_table(title, ("class", *figures), _class_rows(measured), right=figures)


def _class_rows(measured: PairStatistics) -> list[tuple[str, ...]]:
    """Write the figures of each class of text, most bytes first, then of all."""
    classes = sorted(measured.classes.items(), key=lambda item: -item[1].bytes)
    return [
        (
            name,
            f"{tally.bytes:,}",
            *(f"{length:.2f}" for length in tally.bytes_per_token),
            *(f"{tally.share(kind):.1%}" for kind in ("1-1", "1-n", "n-1", "n-m")),
        )
        for name, tally in [*classes, ("all", measured.total)]
    ]


_WORST = ("row", "groups not exact", "boundaries agree", "tokens", "text")


def _verdict(found: CorpusReport) -> str:
    inexact = f", {found.total.inexact:,} groups not exact" if found.total.inexact else ""
    return (
        f"{found.exact_texts:,} of {found.total.texts:,} texts are aligned exactly by {found.aligner}: both sides "
        f"of every group have the same bytes{inexact}."
    )


def _change_lines(found: CorpusReport) -> list[str]:
    lines = []
    for name, changes in zip(found.names, _changes(found), strict=True):
        if changes:
            quoted = "; ".join(
                f"row {row}, byte {change.start}: {_arrow(change)}" for row, change in changes[:CHANGES]
            )
            more = f"; and {len(changes) - CHANGES} more" if len(changes) > CHANGES else ""
            lines.append(f"{name} changes the text in {len(changes):,} places: {quoted}{more}")
    return lines


def _changes(found: CorpusReport) -> tuple[list[tuple[int, Change]], list[tuple[int, Change]]]:
    return (
        [(text.row, change) for text in found.texts for change in text.changes_t],
        [(text.row, change) for text in found.texts for change in text.changes_s],
    )


def _arrow(change: Change) -> str:
    return f"{visible(change.text)} → {visible(change.spelled)}"


def _worst_rows(found: CorpusReport, texts: Sequence[str], count: int) -> list[tuple[str, ...]]:
    return [
        (
            f"{text.row}",
            f"{text.statistics.inexact}",
            f"{text.statistics.agreement:.1%}",
            f"{text.statistics.total.tokens_t} / {text.statistics.total.tokens_s}",
            _quoted(texts[text.row - 1]),
        )
        for text in found.worst(count)
    ]


def _quoted(text: str) -> str:
    shown = visible(text[:SHOWN].encode()).replace("␣", " ")
    return shown + ("…" if len(text) > SHOWN else "")


def report_record(found: CorpusReport, *, worst: int) -> dict[str, Any]:
    """Return the report as plain data. Bytes are in hexadecimal."""

    def change(row: int, changed: Change) -> dict[str, Any]:
        return {"row": row, **asdict(changed), "text": changed.text.hex(), "spelled": changed.spelled.hex()}

    changes_t, changes_s = _changes(found)
    return {
        "t1": found.names[0],
        "t2": found.names[1],
        "aligner": found.aligner,
        "exact_texts": found.exact_texts,
        **statistics_record(found.total),
        "changes": {"t1": [change(*each) for each in changes_t], "t2": [change(*each) for each in changes_s]},
        "worst": [
            {
                "row": text.row,
                "inexact_groups": text.statistics.inexact,
                "agreement": text.statistics.agreement,
            }
            for text in found.worst(worst)
        ],
    }


def statistics_record(measured: PairStatistics) -> dict[str, Any]:
    """Return statistics as plain data."""

    def tally(counts: Tally) -> dict[str, Any]:
        return {
            "bytes": counts.bytes,
            "tokens": [counts.tokens_t, counts.tokens_s],
            "bytes_per_token": list(counts.bytes_per_token),
            "kinds": dict(counts.kinds),
        }

    return {
        "texts": measured.texts,
        "agreement": measured.agreement,
        "boundaries": [measured.boundaries_t, measured.boundaries_s],
        "shared_boundaries": measured.shared,
        "inexact_groups": measured.inexact,
        "total": tally(measured.total),
        "classes": {name: tally(counts) for name, counts in measured.classes.items()},
    }


def report_page(found: CorpusReport, texts: Sequence[str], *, source: str, worst: int) -> str:
    """Render the report as a self-contained page."""
    from cdm_toolkit.cli.align_page import KINDS
    from cdm_toolkit.pages import render

    total = found.total.total
    lengths = zip(found.names, total.bytes_per_token, strict=True)
    return render(
        "corpus.html.j2",
        title=f"{found.names[0]} and {found.names[1]} on {source}",
        about=f"{found.total.texts:,} texts, {total.bytes:,} bytes, {total.tokens_t:,} and {total.tokens_s:,} tokens",
        verdict=f"{_verdict(found)} Boundaries agree {found.total.agreement:.1%}.",
        kinds=KINDS,
        shares=[
            (kind, total.share(kind), f"{total.share(kind):.1%} ({total.kinds.get(kind, 0):,})")
            for kind in KINDS
        ],
        bytes_per_token=[(name, length, f"{length:.2f}") for name, length in lengths],
        class_columns=("class", "bytes", *(f"bytes a token, {name}" for name in found.names), *KINDS),
        classes=_class_rows(found.total),
        changes=_change_lines(found),
        worst_columns=_WORST,
        worst=_worst_rows(found, texts, worst),
    )
