"""`cdm generate`: one answer, and where it was made."""

from __future__ import annotations

import json
from pathlib import Path

from cdm_toolkit.hub.models import resolve_device


def test_an_answer_says_its_device(cdm, small_models: Path) -> None:
    model = small_models / "student"
    answer = cdm("generate", "1 + 1 =", "--model", model, "--max-new-tokens", "2", "--json")
    device = str(resolve_device("auto"))
    assert answer.err == f"device: {device}\n"
    record = json.loads(answer.out)
    assert (record["model"], record["device"]) == (str(model), device)
