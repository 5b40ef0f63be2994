"""A study as one page that a browser shows offline: no script, nothing fetched, light and dark."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from cdm_toolkit import pages
from cdm_toolkit.compare.figures import darkened, marker_path, pictures, svg
from cdm_toolkit.compare.palette import styles
from cdm_toolkit.compare.summary import MethodSummary, summarize
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
        own_settings=_own_settings(summary.methods),
        yaml=_yaml,
    )


def _grouped(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Put columns under their common heads."""
    return [(head, list(group)) for head, group in groupby(columns, key=lambda column: column.heads[0])]


def _data(image: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(image).decode()


# Settings

_OF_A_CELL = ("output", "train.seed")
"""Settings that differ between cells of one method."""


def _own_settings(methods: Sequence[MethodSummary]) -> dict[str, list[str]]:
    """Write where methods differ, by method; what is of a teacher, where those that have one do."""
    flat = {method.name: dict(_flat(method.settings)) for method in methods}

    def differs(key: str) -> bool:
        peers = [each for each in flat.values() if not _is_of_teacher(key) or any(map(_is_of_teacher, each))]
        return any(key not in peer or peer[key] != peers[0].get(key) for peer in peers)

    return {
        name: [
            f"{key}: {_written(value)}"
            for key, value in settings.items()
            if key not in _OF_A_CELL and differs(key)
        ]
        for name, settings in flat.items()
    }


def _is_of_teacher(key: str) -> bool:
    return key.startswith("teachers.")


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give each setting by its dotted name, as assignments have it."""
    if isinstance(value, Mapping) and value:
        items = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and value and not all(isinstance(each, str | int) for each in value):
        items = [(str(i), each) for i, each in enumerate(value)]
    else:
        yield prefix, value
        return
    for key, each in items:
        yield from _flat(each, f"{prefix}.{key}" if prefix else key)


def _written(value: Any) -> str:
    return _yaml(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _yaml(value: Any, **options: Any) -> str:
    import yaml

    plain = json.loads(json.dumps(value, default=str))
    dumped: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, **options)
    return dumped
