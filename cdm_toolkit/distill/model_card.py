"""The card of a trained student: what a person finds in its folder, and the hub shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cdm_toolkit.distill.logs import first_to_last

if TYPE_CHECKING:
    from cdm_toolkit.distill.logs import EvalLog, StepLog
    from cdm_toolkit.distill.settings import DistillConfig


def model_card(
    config: DistillConfig, losses: Sequence[StepLog], evaluations: Sequence[EvalLog], facts: Mapping[str, Any]
) -> str:
    """Write a model card in Markdown, with the hub's metadata on top and the run file that repeats the run."""
    first, last = losses[0], losses[-1]
    teachers = ", ".join(f"{teacher.model} ({teacher.method})" for teacher in config.teachers)
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": config.student}
    tags = ["distillation", "cross-tokenizer"] if config.teachers else ["fine-tuned"]
    figures = [
        ("optimizer steps", f"{facts['steps']:,}"),
        ("tokens of the student", f"{facts['tokens']:,}"),
        ("CE, nats a token", first_to_last(first.ce, last.ce)),
    ]
    for before, after in zip(first.teachers, last.teachers, strict=True):
        figures.append((f"KD on {after.name}", f"{before.kd:.4f} → {after.kd:.4f}"))
        figures.append((f"matched mass of {after.name}", f"{after.matched_mass:.1%}"))
    if evaluations:
        figures += _heldout(evaluations)
    data = ", ".join(f"`{Path(source.path).name}`" for source in config.data.all_sources)
    lines = [
        "---",
        yaml.safe_dump(head | {"tags": tags}, sort_keys=False).strip(),
        "---",
        "",
        f"# {Path(config.output).name}",
        "",
        f"`{config.student}`, "
        + (f"distilled from {teachers}" if teachers else "fine-tuned")
        + f" on {data} with cdm-toolkit {facts['versions']['cdm-toolkit']}.",
        "",
        "| what | figure |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in figures),
        "",
        "Losses are means over the last logged steps of training data, not a measure of quality"
        + ("; held-out rows were not trained on, and chose the weights. " if evaluations else ". ")
        + "`provenance.json` has versions, fingerprints and every logged step. The run file that repeats the run:",
        "",
        "```yaml",
        yaml.safe_dump(
            config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True
        ).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _heldout(evaluations: Sequence[EvalLog]) -> list[tuple[str, str]]:
    """Say how the weights do on the held-out rows, against the first evaluation."""
    first, best = evaluations[0], next(log for log in reversed(evaluations) if log.is_best)
    return [
        ("weights", f"of step {best.step:,}, the best of {len(evaluations)} evaluations"),
        ("held-out CE, nats a token", f"{first.ce:.4f} → {best.ce:.4f}"),
        ("held-out bits per byte", f"{first.bits_per_byte:.4f} → {best.bits_per_byte:.4f}"),
    ]
