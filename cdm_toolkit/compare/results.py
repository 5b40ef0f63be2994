"""All that a study has measured, put together from its cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.compare.best_alpha import at_best_alphas
from cdm_toolkit.compare.prepared import CODE, Shared, open_shared
from cdm_toolkit.compare.study import StudyConfig, grid, heldout_name
from cdm_toolkit.compare.study_folder import Stored, StudyFolder
from cdm_toolkit.compare.types import Cell, CellResult, StudyResult
from cdm_toolkit.errors import BadArtifact, FileProblem


def put_together(study: StudyConfig, folder: StudyFolder, *, command: str) -> StudyResult:
    """Read the cells that are there; `command` is what a reader would run to get them.

    Raises FileProblem where nothing was prepared, and BadArtifact for a cell that is damaged, or that was trained from
    another student, by another teacher or on other rows.
    """
    shared = open_shared(folder)
    cells = list(folder.read_cells(study, grid(study)).values())
    if not cells:
        raise FileProblem(folder.path, "none of its cells has been run", "run the study, or one of its cells")
    for stored in cells:
        _check_origin(folder, shared, stored)
    result = StudyResult(
        name=study.name,
        about=study.about,
        pair=study.pair,
        default=study.default,
        teacher=shared.teacher,
        start=shared.start,
        cells=tuple(stored.result for stored in cells),
        methods=tuple(study.methods),
        planned=len(grid(study)),
        facts=_facts(study, shared, cells, command),
        provenance=dict(provenance(fingerprints=shared.fingerprints, device=study.run.torch_device)),
    )
    return at_best_alphas(result)


def _check_origin(folder: StudyFolder, shared: Shared, stored: Stored) -> None:
    cell = stored.result.cell
    differs = [
        name for name, value in shared.fingerprints.items() if stored.fingerprints.get(name, value) != value
    ]
    if differs:
        problem = f"it was made with another {' and '.join(differs)} than this study"
        raise BadArtifact(folder.of(cell), problem, f"run it again with `cell={cell.index}` and `overwrite`")


def uneven(cells: Sequence[CellResult]) -> list[str]:
    """Say where cells of a seed have not done the same work, which makes them no comparison."""
    seeds = dict.fromkeys(each.cell.seed for each in cells)
    return [
        f"seed {seed} has unequal {unit}: "
        + "; ".join(f"{count:,} by {', '.join(names)}" for count, names in done.items())
        for seed in seeds
        for unit in ("steps", "tokens")
        if len(
            done := _methods_by((getattr(each, unit), each.cell) for each in cells if each.cell.seed == seed)
        )
        > 1
    ]


def _methods_by(found: Iterable[tuple[Any, Cell]]) -> dict[Any, list[str]]:
    """Name the methods of cells, once each, by what was found of them."""
    methods: defaultdict[Any, dict[str, None]] = defaultdict(dict)
    for fact, cell in found:
        methods[fact][cell.method] = None
    return {fact: list(names) for fact, names in methods.items()}


# What a reader must know


def _facts(study: StudyConfig, shared: Shared, cells: Sequence[Stored], command: str) -> dict[str, str]:
    rows = {kind: len(of_kind) for kind, of_kind in shared.heldout.rows.items()}
    results = [stored.result for stored in cells]
    held_out = {
        f"held out, {setting.replace('_', ' ')}": _counted(
            {kind: rows[heldout_name(setting, kind)] for kind in texts}
        )
        for setting, texts in study.heldout.items()
    }
    too_long = f"{shared.passed_over} rows of more than {study.max_length} tokens on a side"
    facts = {
        "trained on": _counted(shared.counts),
        **held_out,
        "passed over": too_long if shared.passed_over else "",
        "steps": f"{_steps(study)}, {_tokens(results)}",
        "seeds": ", ".join(map(str, study.seeds)),
        "machine": "; ".join(dict.fromkeys(stored.machine for stored in cells)),
        "code": _versions(cells),
        "unequal work": "; ".join(uneven(results)),
        "notes": _warnings(cells),
        "command": command,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _counted(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} ({count} rows)" for kind, count in rows.items())


def _steps(study: StudyConfig) -> str:
    own = [f"{entry.steps} with {name}" for name, entry in study.methods.items() if entry.steps is not None]
    return f"{study.steps} of {study.rows_per_step} rows" + (f" ({', '.join(own)})" if own else "")


def _tokens(cells: Sequence[CellResult]) -> str:
    counts = [cell.tokens for cell in cells]
    least, most = min(counts), max(counts)
    return f"{least:,} tokens" if least == most else f"{least:,} to {most:,} tokens by seed"


def _versions(cells: Sequence[Stored]) -> str:
    """Say which cells were trained by which sources, where these differ."""
    methods = _methods_by((stored.fingerprints[CODE], stored.result.cell) for stored in cells)
    if len(methods) < 2:
        return ""
    parts = (f"{code[:8]} trained {', '.join(names)}" for code, names in methods.items())
    return f"not one version of this toolkit: {'; '.join(parts)}"


def _warnings(cells: Sequence[Stored]) -> str:
    """Give each warning of a run once, with the methods that it is about where it is not about all."""
    about = _methods_by((warning, stored.result.cell) for stored in cells for warning in stored.warnings)
    every = {stored.result.cell.method for stored in cells if stored.result.settings.get("teachers")}
    return "; ".join(
        warning if every <= set(methods) else f"{', '.join(methods)}: {warning}"
        for warning, methods in about.items()
    )
