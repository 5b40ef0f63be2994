"""A study as one page that a browser shows offline: no script, nothing fetched, light and dark."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from cdm_toolkit import pages
from cdm_toolkit.compare.figures import darkened, marker_path, pictures, svg
from cdm_toolkit.compare.palette import styles
from cdm_toolkit.compare.summary import summarize
from cdm_toolkit.compare.table import MEASURES, MISSING, SHARE, Column, mean_share, shares
from cdm_toolkit.compare.types import StudyResult


def write_page(result: StudyResult, path: str | Path) -> None:
    """Write a study's page, whole or not at all. FileProblem, and MissingExtra without matplotlib."""
    pages.write_page(path, study_page(result))


def study_page(result: StudyResult) -> str:
    """Draw a study as one self-contained page."""
    summary = summarize(result)
    drawn = {name: svg(figure) for name, figure in pictures(result, summary).items()}
    by_kind = {measure.title: summary.by_kind(measure.name) for measure in MEASURES}
    return pages.render(
        "study.html.j2",
        result=result,
        summary=summary,
        styles=styles(result.methods),
        marker_path=marker_path,
        pictures={name: (_data(light), _data(darkened(light))) for name, light in drawn.items()},
        overview=_grouped(summary.columns("text", "cost")),
        suites=_grouped(summary.columns("suites")),
        continuations=_grouped(summary.columns("continuations")),
        by_kind={title: _grouped(columns) for title, columns in by_kind.items() if columns},
        share=SHARE,
        missing=MISSING,
        shares=shares,
        mean_share=mean_share,
        yaml=_yaml,
    )


def _grouped(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Put columns under their common heads."""
    return [(head, list(group)) for head, group in groupby(columns, key=lambda column: column.heads[0])]


def _data(image: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(image).decode()


def _yaml(value: Any) -> str:
    import yaml

    plain = json.loads(json.dumps(value, default=str))
    dumped: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return dumped
