from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from cdm_toolkit.cli.compare_table import table
from cdm_toolkit.compare.types import Cell, CellResult, Measured, ModelScores, StudyResult


def scores(share: float) -> ModelScores:
    """Score a model that closes so much of the gap from 2 bits per byte to 1."""
    measured = Measured((2 - share) * 1000, 1000, (1 - share) * 100, 100)
    return ModelScores({"words": measured}, {"manual": measured}, {})


def cell(index: int, method: str, share: float, seed: int) -> CellResult:
    measured = scores(share + 0.01 * seed)
    return CellResult(Cell(index, method, 0.5, seed), measured, 60, 9000, 1.25, 1500 * 2**20, (), {})


def study(names: Sequence[str] = ("sft", "exact", "spelling", "spelling k=20")) -> StudyResult:
    cells = [
        cell(3 * i + seed, name, 0.3 + 0.1 * i, seed) for i, name in enumerate(names) for seed in range(3)
    ]
    return StudyResult(
        "tiny",
        "",
        "teacher → student",
        "spelling",
        scores(1),
        scores(0),
        tuple(cells),
        tuple(names),
        len(cells),
        {},
        {},
    )


def shown(result: StudyResult, width: int) -> list[str]:
    console = Console(width=width, highlight=False, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(table(result))
    return [line.rstrip() for line in capture.get().splitlines()]


def row(lines: Sequence[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name))


def test_at_120_columns_all_is_there() -> None:
    lines = [" ".join(line.split()) for line in shown(study(), 120)]
    assert "● exact 3 0.410±0.010 0.410±0.010 0.410±0.010 1.590 1.590 0.590 0.590 1.250 1,500" in lines
    assert "start 0.000 0.000 0.000 2.000 2.000 1.000 1.000 – –" in lines
    assert "teacher 1.000 1.000 1.000 1.000 1.000 0.000 0.000 – –" in lines


def test_at_80_columns_bits_and_the_stds_of_the_sides_give_way() -> None:
    lines = [" ".join(line.split()) for line in shown(study(), 80)]
    assert "● exact 3 0.410 0.410 0.410±0.010 0.590 0.590 1.250 1,500" in lines


def test_without_a_gap_outside_the_share_inside_keeps_its_std() -> None:
    made = study()
    better = {"manual": Measured(500, 1000, 100, 100)}
    made = replace(made, start=replace(made.start, outside=better))
    lines = [" ".join(line.split()) for line in shown(made, 80)]
    assert "● exact 3 0.410±0.010 – 0.590 0.590 1.250 1,500" in lines


@pytest.mark.parametrize("width", [40, 50, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(width: int) -> None:
    lines = shown(study(), width)
    assert max(map(cell_len, lines)) <= width
    assert "0.410" in row(lines, " ● exact")
    assert "…" not in "\n".join(lines)


def test_the_best_method_comes_first_and_the_front_is_marked() -> None:
    lines = [line for line in shown(study(), 100) if line.startswith((" ● ", " ○ "))]
    assert [line.split("  ")[0].strip() for line in lines] == [
        "○ spelling k=20 ◆",
        "● spelling",
        "● exact",
        "● sft",
    ]


def test_the_verdicts_stand_below() -> None:
    lines = shown(study(), 100)
    assert lines[-4:] == [
        "spelling beats 2 of 3 methods, is behind 1.",
        "▼ spelling is behind spelling k=20: -0.100 [-0.100, -0.100], 3 seeds, p < 0.001",
        "▲ spelling beats exact: +0.100 [0.100, 0.100], 3 seeds, p < 0.001",
        "▲ spelling beats sft: +0.200 [0.200, 0.200], 3 seeds, p < 0.001",
    ]


def test_what_to_know_before_trusting_them_is_last() -> None:
    lines = shown(replace(study(), planned=20), 100)
    assert lines[-1] == "note: 12 of 20 cells are measured: means and verdicts may change."


def test_names_are_printed_as_they_are() -> None:
    lines = shown(study(("exact [red]x[/red]", "spelling")), 120)
    assert "● exact [red]x[/red]" in row(lines, " ○ exact").replace("○", "●")
    assert any(line.endswith("3 seeds, p < 0.001") and "exact [red]x[/red]" in line for line in lines)


def test_a_study_without_cells_says_so() -> None:
    lines = shown(replace(study(), cells=(), methods=(), planned=0), 80)
    assert lines == ["tiny: teacher → student", "No method has been measured yet."]


def test_the_best_of_a_column_is_bold() -> None:
    console = Console(width=120, force_terminal=True, color_system="truecolor", highlight=False)
    with console.capture() as capture:
        console.print(table(study()))
    best = next(line for line in capture.get().splitlines() if "spelling k=20" in line)
    assert "\x1b[1m" in best
    assert "\x1b[38;2;0;114;178m○" in best
