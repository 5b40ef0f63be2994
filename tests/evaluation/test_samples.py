"""The committed word problems: what the generator writes, right, and held out in earnest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.samples import FILES, sample_path

SPLITS = ("train", "heldout")
"""Of the word problems."""
GENERATOR = Path(__file__).resolve().parents[2] / "tools" / "make_sample"
STEP = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)")
NUMBER = re.compile(r"\d+")


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in sample_path(split).read_text(encoding="utf-8").splitlines()]


def left_to_right(expression: str) -> float:
    """Work an expression out, multiplication before addition, without eval."""
    first, *rest = re.split(r" ([-+*/]) ", expression)
    terms = [float(first)]
    for sign, digits in zip(rest[::2], rest[1::2], strict=True):
        value = float(digits)
        if sign == "*":
            terms[-1] *= value
        elif sign == "/":
            terms[-1] /= value
        else:
            terms.append(value if sign == "+" else -value)
    return sum(terms)


def test_the_generator_writes_the_committed_files(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(GENERATOR), "--output", str(tmp_path)], check=True, capture_output=True
    )
    for split in SPLITS:
        path = sample_path(split)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_each_step_is_right_and_leads_to_the_answer(split: str) -> None:
    for row in rows(split):
        *steps, final = row["answer"].split("\n")
        assert len(steps) >= 2, row
        known = set(NUMBER.findall(row["question"]))
        for step in steps:
            ((expression, result),) = STEP.findall(step)
            assert left_to_right(expression) == float(result), step
            used = set(NUMBER.findall(expression))
            # a number in a step was given, was found before, or is a constant of the template: 2, 3, 4 or 100
            assert used <= known | {"2", "3", "4", "100"}, (row, step)
            known.add(result)
        assert final == f"#### {result}", row
        assert int(result) > 0


def test_held_out_problems_share_neither_text_nor_numbers_with_training() -> None:
    train, heldout = rows("train"), rows("heldout")
    assert (len(train), len(heldout)) == (480, 60)
    questions = Counter(row["question"] for row in train + heldout)
    assert max(questions.values()) == 1

    def kind_and_numbers(row: dict[str, str]) -> tuple[str, tuple[str, ...]]:
        solution = row["answer"]
        operators = "".join(re.findall(r"[-+*/=]", solution))
        return operators, tuple(sorted(NUMBER.findall(solution)))

    seen = {kind_and_numbers(row) for row in train}
    assert not seen & {kind_and_numbers(row) for row in heldout}


def test_the_problems_are_varied_and_small() -> None:
    shapes = Counter(re.sub(r"\d+|\b[A-Z]\w+", "_", row["question"]) for row in rows("train"))
    assert len(shapes) > 100
    assert sum(sample_path(split).stat().st_size for split in SPLITS) < 250_000


@pytest.mark.parametrize("name", FILES)
def test_each_sample_is_read_by_its_name(name: str) -> None:
    found = read_rows(f"sample:{name}")
    assert len(found) == len(rows(name))
    assert len({row.completion for row in found}) == len(found)
