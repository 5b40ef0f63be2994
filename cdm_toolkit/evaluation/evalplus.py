"""HumanEval+ and MBPP+ from the package evalplus: inputs, and a reference solution for the expected outputs.

An output is correct if it equals the reference solution's, floats within a tolerance. This is evalplus's rule except
for a few tasks with special comparisons; of these, only that of HumanEval/32 is implemented here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from cdm_toolkit.errors import CdmError, NoData

READERS = {"humaneval+": "get_human_eval_plus", "mbpp+": "get_mbpp_plus"}
TEST = """
import copy
from math import inf, isclose, nan

names = {{}}
exec({reference!r}, names)
reference, tolerance, inputs = names[{entry_point!r}], {tolerance!r} or 1e-6, {inputs!r}


def same(found, wanted):
    if isinstance(wanted, float) and isinstance(found, (int, float)):
        return found == wanted or isclose(found, wanted, rel_tol=1e-7, abs_tol=tolerance)
    if isinstance(wanted, (list, tuple)) and type(found) is type(wanted):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == wanted)


def check(candidate):
    for arguments in inputs:
        found = candidate(*copy.deepcopy(arguments))
        assert {rule}
"""
EQUAL = "same(found, reference(*copy.deepcopy(arguments)))"
RULES = {"find_zero": "abs(names['poly'](*arguments, found)) <= tolerance"}


def read_plus(name: str, suite: str) -> list[dict[str, str]]:
    """Read a data set of evalplus; the test of each row compares with its reference solution.

    Raises CdmError where the package is not installed, NoData where it has no data within reach.
    """
    if find_spec("evalplus") is None:
        raise CdmError(
            f"the data set {name!r} needs evalplus, which is not installed", fix="pip install evalplus"
        )
    try:
        rows = getattr(import_module("evalplus.data"), READERS[name])()
    except Exception as error:  # evalplus downloads the data, which can fail with any exception
        why = " ".join(str(error).split()) or type(error).__name__
        raise NoData(suite, [f"evalplus: {why}"], "task_id, prompt, entry_point and test") from None
    return [_row(task_id, row) for task_id, row in rows.items()]


def _row(task_id: str, row: Mapping[str, Any]) -> dict[str, str]:
    test = TEST.format(
        reference=row["prompt"] + row["canonical_solution"],
        entry_point=row["entry_point"],
        tolerance=row["atol"],
        inputs=[*row["base_input"], *row["plus_input"]],
        rule=RULES.get(row["entry_point"], EQUAL),
    )
    return {"task_id": task_id, "prompt": row["prompt"], "entry_point": row["entry_point"], "test": test}
