from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cdm_toolkit.compare.types import StudyResult
from cdm_toolkit.errors import FileProblem

pytest.importorskip("matplotlib", reason="the extra `compare` is not installed")

from cdm_toolkit.compare.study_page import study_page, write_page

Make = Callable[..., StudyResult]
_VOID = {"meta", "img", "source", "br", "path"}


class Outline(HTMLParser):
    """Read a page: its text, its elements, and whether they nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(full_study: StudyResult) -> str:
    return study_page(full_study)


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def test_the_page_needs_nothing_but_itself(page: str, outline: Outline) -> None:
    assert "script" not in {tag for tag, _ in outline.tags}
    sources = [
        value
        for _, attributes in outline.tags
        for name, value in attributes.items()
        if name in ("src", "srcset", "href")
    ]
    assert len(sources) == 4
    assert all(source and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "url(" not in page
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", page)


def test_pictures_come_light_and_dark_and_are_told_to_those_who_do_not_see(outline: Outline) -> None:
    media = [attributes["media"] for tag, attributes in outline.tags if tag == "source"]
    assert media == ["(prefers-color-scheme: dark)"] * 2
    alts = [attributes["alt"] or "" for tag, attributes in outline.tags if tag == "img"]
    assert "spelling: inside 0.595, outside 0.434, on the Pareto front; " in alts[0]
    assert alts[1].startswith("Lines over α")


def test_the_page_says_what_was_compared_and_what_came_out(outline: Outline) -> None:
    for text in (
        "smollm2 → smollm2 with gpt2's tokenizer (6,000 entries)",
        "spelling beats 8 of 10 methods, is behind none; no difference is shown to 2.",
        "spelling beats exact: +0.034 [",
        "word-problems (40 rows), gsm8k (40 rows), code (40 rows)",
        "Linux x86_64, 2 cores, torch 2.13, float32",
        "cdm-toolkit: 0.1.0",
        "teacher: 9f3c00aa",
    ):
        assert text in outline.text


def test_the_best_figure_of_a_column_is_bold(page: str) -> None:
    assert '<td class="figure best first">0.595 <span class="spread">± 0.010</span></td>' in page
    assert '<td class="figure first">0.474 <span class="spread">± 0.009</span></td>' in page


def test_every_kind_and_every_point_over_alpha_has_its_figures(outline: Outline) -> None:
    for kind in ("word-problems", "gsm8k", "code", "manual", "headers"):
        assert outline.text.count(kind) >= 3
    rows = outline.text.split("Over α")[1].split("Settings")[0]
    assert rows.count("gold") == rows.count("spelling") == 5


def test_all_settings_of_a_method_are_there(page: str) -> None:
    settings = page.split("<h2>Settings</h2>")[1]
    assert "<summary>spelling k=20</summary><pre>student: shared/student" in settings
    assert "top_k: 20" in settings


def test_everything_from_outside_is_escaped(make_study: Make) -> None:
    evil = '<script>alert("1")</script>'
    made = make_study(("sft", "spelling"))
    cells = tuple(
        replace(
            each,
            cell=replace(each.cell, method=each.cell.method.replace("sft", f"sft {evil}")),
            settings={evil: evil},
        )
        for each in made.cells
    )
    scores = made.start
    kinds = {kind: evil if kind == "code" else kind for kind in scores.inside}

    def renamed(inside: object) -> dict[str, object]:
        return {kinds[kind]: each for kind, each in inside.items()}  # type: ignore[attr-defined]

    made = replace(
        made,
        name=evil,
        about=evil,
        pair=evil,
        facts={evil: evil},
        provenance={evil: evil},
        methods=(f"sft {evil}", "spelling"),
        planned=99,
        start=replace(made.start, inside=renamed(made.start.inside), suites={evil: {evil: 0.5}}),
        teacher=replace(made.teacher, inside=renamed(made.teacher.inside)),
        cells=tuple(
            replace(
                each,
                scores=replace(each.scores, inside=renamed(each.scores.inside), suites={evil: {evil: 0.5}}),
            )
            for each in cells
        ),
    )
    page = study_page(made)
    assert "<script" not in page
    found = Outline(page)
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(evil) > 12


def test_continuations_are_there_to_be_read(with_near: StudyResult) -> None:
    page = study_page(with_near)
    assert "<h2>Greedy continuations</h2>" in page
    assert "<summary>code: 1 prompt</summary><pre>def &lt;f&gt;(</pre>" in page
    assert page.count("x0): pass &amp; go") == 2 + 3  # teacher and start, the first seed of each method
    assert "Agreement of greedy continuations with the teacher" in page


def test_no_continuations_have_no_heading(page: str) -> None:
    assert "Greedy" not in page


def test_a_side_without_a_gap_is_said_on_the_page(no_gap_outside: StudyResult) -> None:
    found = Outline(study_page(no_gap_outside))
    assert "outside: the student is no worse than the teacher before training" in found.text
    assert "Judged by the share inside: of the gap between start and teacher" in found.text
    assert "outside no gap" in next(dict(a)["alt"] or "" for tag, a in found.tags if tag == "img")


def test_a_study_without_cells_is_a_page_too(full_study: StudyResult) -> None:
    found = Outline(study_page(replace(full_study, cells=())))
    assert "No method has been measured yet." in found.text
    assert f"0 of {full_study.planned} cells are measured" in found.text
    assert not any(tag in ("img", "svg") for tag, _ in found.tags)


def test_suites_have_a_table(make_study: Make) -> None:
    made = make_study(("sft", "spelling"))
    cells = tuple(
        replace(each, scores=replace(each.scores, suites={"math": {"exact": 0.125}})) for each in made.cells
    )
    made = replace(made, cells=cells, start=replace(made.start, suites={"math": {"exact": 0.0625}}))
    suites = Outline(study_page(made)).text.split("Suites")[1].split("By kind of text")[0]
    assert "math" in suites
    assert "0.125" in suites
    assert "0.062" in suites


def test_a_page_is_written_whole(make_study: Make, tmp_path: Path) -> None:
    made = make_study(("sft",))
    write_page(made, tmp_path / "out" / "report.html")
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == study_page(made)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    with pytest.raises(FileProblem):
        write_page(made, tmp_path / "out" / "report.html" / "below")
