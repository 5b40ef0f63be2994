"""Pages that a browser shows offline: one file each, light and dark, made of the Jinja2 templates in this folder.

All extend `base.html.j2` and look as `base.css` says; what a page has of its own is in a style sheet beside it.
Everything that a template writes is escaped.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_toolkit.artifacts.atomic import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: object) -> str:
    """Fill in a template of this folder."""
    return _environment().get_template(template).render(values)


def write_page(path: str | Path, content: str) -> None:
    """Write a page or a picture, whole or not at all. Raises FileProblem."""
    write_whole(path, content.encode())


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
