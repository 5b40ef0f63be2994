from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cdm_toolkit.compare.types import StudyResult
from cdm_toolkit.errors import FileProblem, MissingExtra

pytest.importorskip("matplotlib", reason="the extra `compare` is not installed")

from cdm_toolkit.compare.figures import DARK, PAPER, darkened, draw, marker_path, pictures, svg
from cdm_toolkit.compare.palette import styles
from cdm_toolkit.compare.summary import summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Make = Callable[..., StudyResult]


def figures_of(result: StudyResult) -> dict[str, Figure]:
    return pictures(result, summarize(result))


@pytest.fixture(scope="module")
def drawn(full_study: StudyResult) -> dict[str, Figure]:
    return figures_of(full_study)


def test_pictures_are_png_files_of_150_dots_an_inch(full_study: StudyResult, tmp_path: Path) -> None:
    from matplotlib.image import imread

    written = draw(full_study, tmp_path / "out")
    assert [path.name for path in written] == ["trade-off.png", "alphas.png"]
    assert imread(written[0]).shape[:2] == (990, 1500)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written}


def test_nothing_is_drawn_of_nothing(full_study: StudyResult, tmp_path: Path) -> None:
    assert draw(replace(full_study, cells=()), tmp_path) == []


def test_a_place_that_cannot_be_written_is_an_error_of_ours(make_study: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem):
        draw(make_study(("sft",)), tmp_path / "file")


def test_without_matplotlib_the_extra_is_named(
    full_study: StudyResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"cdm-toolkit\[compare\]"):
        draw(full_study, tmp_path)


def test_importing_draws_in_no_matplotlib_and_drawing_no_pyplot() -> None:
    code = (
        "import sys, cdm_toolkit.compare.figures as f; assert 'matplotlib' not in sys.modules;"
        "f._plane('', dict.fromkeys(f.PLANE, f.Gap(2, 1)))[0].savefig(sys.argv[1], format='png');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True, timeout=60)


def test_drawing_leaves_matplotlib_s_settings_alone(drawn: dict[str, Figure]) -> None:
    from matplotlib import rcParams

    before = dict(rcParams)
    svg(drawn["alphas"])
    assert dict(rcParams) == before


def test_the_same_picture_is_the_same_svg(make_study: Make) -> None:
    first, second = (svg(figures_of(make_study(("exact", "spelling")))["trade-off"]) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("picture", "names"),
    [
        ("trade-off", ("sft", "exact", "spelling", "spelling k=20", "spelling any digits")),
        ("alphas", ("spelling", "gold")),
    ],
)
def test_a_method_has_its_colour_and_marker_in_every_legend(
    drawn: dict[str, Figure], full_study: StudyResult, picture: str, names: tuple[str, ...]
) -> None:
    found, expected = in_legend(drawn[picture]), styles(full_study.methods)
    for name in names:
        assert found[name].get_markerfacecolor() == expected[name].fill
        assert found[name].get_markeredgecolor() == expected[name].edge
        assert found[name].get_marker() == expected[name].marker


def in_legend(figure: Figure) -> dict[str, Line2D]:
    (legend,) = figure.legends
    lines = zip(legend.get_texts(), legend.get_lines(), strict=True)
    return {text.get_text().removesuffix("  (Pareto front)"): line for text, line in lines}


def test_a_part_of_a_study_is_drawn_as_in_the_whole(make_study: Make) -> None:
    whole = make_study(("sft", "spelling k=20", "spelling any digits"))
    part = replace(whole, cells=tuple(each for each in whole.cells if each.cell.method != "spelling k=20"))
    was, now = (in_legend(figures_of(each)["trade-off"])["spelling any digits"] for each in (whole, part))
    assert (now.get_marker(), now.get_color()) == (was.get_marker(), was.get_color())


def texts_of(figure: Figure) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for text in figure.axes[0].texts:
        found.setdefault(text.get_text(), []).append(text)
    return found


def test_marks_grow_with_alpha_along_a_line(drawn: dict[str, Figure]) -> None:
    figure = drawn["alphas"]
    blue = [
        each for each in figure.axes[0].lines if each.get_color() == styles(["spelling"])["spelling"].fill
    ]
    line = next(each for each in blue if len(each.get_xdata()) == 5)
    ends = {tuple(xy): each.get_markersize() for each in blue for xy in each.get_xydata() if each is not line}
    sizes = [ends[tuple(xy)] for xy in line.get_xydata()]
    assert sizes == sorted(sizes)
    legend = {text: each.get_markersize() for text, each in in_legend(figure).items()}
    assert (legend["α 0.1"], legend["α 0.9"]) == (sizes[0], sizes[-1])


def test_a_mark_is_the_mean_of_its_seeds_with_their_std(make_study: Make) -> None:
    made = make_study(("sft",))
    (column,) = (
        each for each in summarize(made).columns("text") if each.heads == ("share of the gap", "inside")
    )
    (axes,) = figures_of(made)["trade-off"].axes
    (bars,) = axes.containers
    assert bars.lines[0].get_xdata()[0] == pytest.approx(column.means["sft"].value)
    left, right = (cap.get_xdata()[0] for cap in bars.lines[1][:2])
    assert (right - left) / 2 == pytest.approx(column.means["sft"].std)


def test_the_front_is_drawn_through_those_on_it(drawn: dict[str, Figure], full_study: StudyResult) -> None:
    (line,) = (each for each in drawn["trade-off"].axes[0].lines if each.get_drawstyle() == "steps-pre")
    summary = summarize(full_study)
    (best,) = (each.name for each in summary.methods if each.on_front)
    shares = [
        column.means[best].value
        for column in summary.columns("text")
        if column.measure == "share of the gap" and column.name != "mean"
    ]
    assert tuple(line.get_xydata()[1]) == pytest.approx(tuple(shares))


def test_lines_have_a_picture_of_their_own(make_study: Make) -> None:
    names = ("sft", "spelling", "gold", "uld")
    made = make_study(names, curves=dict.fromkeys(names[1:], (0.1, 0.9)))
    drawn = figures_of(made)
    assert list(drawn) == ["trade-off", "alphas"]
    assert not any(text.startswith("α") for text in in_legend(drawn["trade-off"]))
    (axes,) = drawn["alphas"].axes
    lines = [each for each in axes.lines if len(each.get_xdata()) == 3]
    assert {line.get_color() for line in lines} == {styles([name])[name].fill for name in names[1:]}
    assert set(in_legend(drawn["alphas"])) == {*names[1:], "", "α 0.1", "α 0.9"}


def test_the_axes_say_what_they_are_and_the_legend_is_beside_them(drawn: dict[str, Figure]) -> None:
    figure = drawn["trade-off"]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "share of the gap closed inside the domain"
    assert axes.get_ylabel() == "share of the gap closed outside the domain"
    assert figure.legends[0].get_window_extent().x0 > axes.bbox.x1


def test_the_start_is_marked_where_it_is_in_view(make_study: Make, drawn: dict[str, Figure]) -> None:
    assert "start" not in texts_of(drawn["trade-off"])
    made = make_study(("sft", "spelling"))
    worse = {kind: replace(each, bits=each.bits * 1.9) for kind, each in made.start.inside.items()}
    cells = [
        replace(each, scores=replace(each.scores, inside=worse, outside=made.start.outside))
        for each in made.cells
    ]
    spread = (*cells[:3], *made.cells[3:])
    assert "start" in texts_of(figures_of(replace(made, cells=spread))["trade-off"])


def test_without_a_gap_the_axis_is_in_bits_per_byte(no_gap_outside: StudyResult) -> None:
    (axes,) = figures_of(no_gap_outside)["trade-off"].axes
    assert axes.get_ylabel() == "bits per byte gained outside the domain (no gap)"
    assert axes.get_ylim()[1] < 0  # all methods are worse than such a start


def test_one_method_with_one_seed_can_be_drawn(make_study: Make) -> None:
    assert set(figures_of(make_study(("sft",), seeds=(0,)))) == {"trade-off"}


def test_a_study_with_one_side_has_no_trade_off(make_study: Make) -> None:
    made = make_study(("sft", "spelling"))
    made = replace(
        made,
        start=replace(made.start, outside={}),
        teacher=replace(made.teacher, outside={}),
        cells=tuple(replace(each, scores=replace(each.scores, outside={})) for each in made.cells),
    )
    assert figures_of(made) == {}


def test_a_dark_picture_has_dark_paper_and_the_colours_of_the_methods(make_study: Make) -> None:
    for figure in figures_of(make_study(("sft", "spelling"))).values():
        light = svg(figure).decode()
        dark = darkened(light.encode()).decode()
        assert light.count(PAPER) == dark.count(DARK[PAPER]) > 0
        assert not any(color in dark for color in DARK)
        assert dark.count(styles(["spelling"])["spelling"].fill) == light.count("#0072b2") > 0


@pytest.mark.parametrize("name", ["spelling", "exact", "alm", "gold", "spelling k=20"])
def test_a_marker_s_outline_fills_its_box(name: str) -> None:
    path = marker_path(styles([name])[name])
    figures = [float(each) for each in path.strip("MZ").replace("L", " ").split()]
    assert min(figures) >= 0.9
    assert max(figures) <= 15.1
    assert max(figures) - min(figures) > 12


def test_three_rings_have_the_same_plane(with_near: StudyResult) -> None:
    (plane,) = figures_of(with_near)["trade-off"].axes
    assert (plane.get_xlabel(), plane.get_ylabel()) == (
        "share of the gap closed inside the domain",
        "share of the gap closed outside the domain",
    )
