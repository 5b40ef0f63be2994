"""The grid of a study: which runs it has, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from cdm_toolkit.compare.study import StudyConfig
from cdm_toolkit.compare.types import Cell
from cdm_toolkit.errors import BadOption


def grid(study: StudyConfig) -> tuple[Cell, ...]:
    """List the cells: every method with its first seed, then with the second and so on, then the lines over alpha.

    So that a study which is stopped early is still a comparison. The lines have the first seed of a method, or all
    where alpha is chosen among their points.
    """
    return tuple(
        Cell(index, method, alpha, seed, in_curve)
        for index, (method, alpha, seed, in_curve) in enumerate((*_own(study), *_curves(study)))
    )


def cell_at(study: StudyConfig, which: int | str) -> Cell:
    """Find a cell by its number or its name. Raises BadOption."""
    cells = grid(study)
    for cell in cells:
        if str(which) in (str(cell.index), cell.name):
            return cell
    raise BadOption(
        "cell", which, f"0 to {len(cells) - 1}, or a cell's name: `list_cells` shows what each is"
    )


def _own(study: StudyConfig) -> Iterator[tuple[str, float, int, bool]]:
    seeds = {name: entry.seeds or study.seeds for name, entry in study.methods.items()}
    for of_turn in zip_longest(*seeds.values()):
        for name, seed in zip(seeds, of_turn, strict=True):
            if seed is not None:
                yield name, study.alpha_of(name), seed, False


def _curves(study: StudyConfig) -> Iterator[tuple[str, float, int, bool]]:
    for name, alphas in study.curves.items():
        seeds = study.methods[name].seeds or study.seeds
        for seed in seeds if study.select_alpha_on else seeds[:1]:
            for alpha in sorted(alphas):
                yield name, alpha, seed, True
