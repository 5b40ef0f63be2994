"""A whole training step on CUDA tensors without data: devices, looks at the device, live bytes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Trace each method with two layers of each model; a wrong device or a look at values raises."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(TOOLS), *sys.path])
        from benchmarks.trace import ACROSS, compiled, trace
    library = compiled(tmp_path_factory.mktemp("trace"))
    small = {"layers_t": 2, "layers_s": 2}
    found = trace(library, ("sft", *ACROSS), **small)
    found += trace(library, ("kl",), same_tokenizer=True, **small)
    return {step["step"]: step for step in found}


@pytest.mark.slow
def test_a_step_on_cuda_has_the_memory_of_sft_and_the_teacher(traced: dict[str, dict[str, Any]]) -> None:
    base = traced["sft"]
    for name, step in traced.items():
        assert step["peak"] > step["before"] > 0
        assert not step["float32_logits"], f"{name} makes logits in float32"
        if name != "kl":  # whose teacher has a larger vocabulary here
            assert step["peak"] <= 1.15 * base["peak"], name


@pytest.mark.slow
def test_the_trace_sees_the_student_s_logits_and_their_gradient(traced: dict[str, dict[str, Any]]) -> None:
    shapes = [tuple(held["shape"]) for held in traced["cdm"]["at_peak"]]
    assert shapes.count((4 * 1023, 152_064)) == 2
