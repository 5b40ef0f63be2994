"""Pages: whole files that need nothing else, everything escaped, one look."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from cdm_toolkit import pages
from cdm_toolkit.pages import render, write_page

FOLDER = Path(pages.__file__).parent
PAGES = sorted(
    path.name for path in FOLDER.glob("*.html.j2") if path.stem not in ("base.html", "macros.html")
)
COVERAGE = {"about": "", "kinds": {}, "mass": [], "shares": [], "classes": [], "corpus": None}


def test_what_a_template_writes_is_escaped() -> None:
    evil = '<script>"x"</script>'
    page = render(
        "coverage.html.j2",
        **COVERAGE | {"title": evil, "about": evil, "corpus": evil, "shares": [(evil, 1.0, evil)]},
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;&#34;x&#34;&lt;/script&gt;") == 6


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render("coverage.html.j2", **COVERAGE)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_has_the_common_look(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8").startswith('{% extends "base.html.j2" %}')


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.css")), ids=lambda path: path.name)
def test_a_style_sheet_fetches_nothing_and_names_its_fonts_and_colours_once(path: Path) -> None:
    content = path.read_text(encoding="utf-8")
    assert "url(" not in content
    assert "@import" not in content
    if path.name != "base.css":
        assert not re.search(r"monospace|sans-serif", content)


def test_bars_are_as_long_as_the_longest_allows() -> None:
    page = render(
        "coverage.html.j2", **COVERAGE | {"title": "t", "shares": [("a", 0.5, "x"), ("b", 0.25, "y")]}
    )
    assert re.findall(r"--share: ([\d.]+)", page) == ["1.0000", "0.5000"]
    empty = render("coverage.html.j2", **COVERAGE | {"title": "t", "shares": [("a", 0.0, "x")]})
    assert re.findall(r"--share: ([\d.]+)", empty) == ["0.0000"]


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    write_page(tmp_path / "new" / "page.html", "ä")
    assert (tmp_path / "new" / "page.html").read_bytes() == "ä".encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
