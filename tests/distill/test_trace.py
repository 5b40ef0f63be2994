"""A training step on CUDA tensors that hold nothing: one device, no look at values, no more memory than SFT."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from benchmarks.trace import device_library, trace  # noqa: E402

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="a CPU build of torch needs a C++ compiler for this",
)

SHALLOW = {"layers_t": 1, "layers_s": 1}
"""So that no activations hide what the loss holds. Widths and vocabularies are those of the real models."""
LOGITS = 2 * 4 * 1023 * 152_064
"""Bytes of the student's, in bfloat16."""
LOGITS_T = 2 * 4 * 1023 * 128_256


ACROSS = ("spelling", "cdm", "exact", "uld", "alm", "gold")
"""The methods for two tokenizers: min-ed and prefix are exact with other ids in the table."""
CASES: dict[str, dict[str, Any]] = {
    "across": {"steps": ("sft", "sft of transformers", *ACROSS)},
    "on another device": {"steps": ("spelling", "alm"), "teacher_on": ("cuda:1",)},
    "on two devices": {"steps": ("spelling",), "teacher_on": ("cuda:1", "cuda:2")},
    "one tokenizer": {"steps": ("sft", "kl", "jsd"), "same_tokenizer": True},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    return device_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def traces(library: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Trace all that is looked at here in one process, which takes seconds to start."""
    return dict(zip(CASES, trace([case | SHALLOW for case in CASES.values()], library), strict=True))


@pytest.fixture(scope="module")
def across(traces: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Give the steps of two tokenizers by name."""
    return {traced["step"]: traced for traced in traces["across"]}


def in_step(traced: dict[str, Any]) -> int:
    return int(traced["peak"] - traced["before"])


def no_more_than(step: dict[str, Any], base: dict[str, Any]) -> bool:
    return bool(step["peak"] <= 1.15 * base["peak"] and in_step(step) <= 1.15 * in_step(base))


@pytest.mark.parametrize("name", ACROSS)
def test_needs_no_more_memory_than_sft_and_the_teacher(name: str, across: dict[str, dict[str, Any]]) -> None:
    assert no_more_than(across[name], across["sft"])


def test_a_teacher_on_another_device_is_there_alone(
    across: dict[str, dict[str, Any]], traces: dict[str, list[dict[str, Any]]]
) -> None:
    """Its weights once, and its logits; the student's device is as if there were no teacher, but for the signal."""
    for step in traces["on another device"]:
        here = across[step["step"]]
        (peak, before) = step["elsewhere"]["cuda:1"]
        assert before == step["teacher_weights"]
        assert peak - before < 1.25 * LOGITS_T
        assert step["before"] == here["before"] - step["teacher_weights"]
        assert in_step(step) <= 1.01 * in_step(here)


def test_layers_and_head_of_a_teacher_on_two_devices(traces: dict[str, list[dict[str, Any]]]) -> None:
    """Hidden states go to the head at the positions that are asked for alone, and no logits leave its device."""
    (step,) = traces["on two devices"]
    layers, head = (step["elsewhere"][device] for device in ("cuda:1", "cuda:2"))
    assert layers[1] + head[1] == step["teacher_weights"]
    assert layers[0] - layers[1] < 0.5 * LOGITS_T < head[0] - head[1] < 1.25 * LOGITS_T


def test_nor_do_methods_of_one_tokenizer(traces: dict[str, list[dict[str, Any]]]) -> None:
    base, *steps = traces["one tokenizer"]
    assert all(no_more_than(step, base) for step in steps)


def test_mixed_precision_makes_no_float32_copy_of_the_logits(across: dict[str, dict[str, Any]]) -> None:
    """The same trace finds those that the loss of transformers makes."""
    theirs = across["sft of transformers"]
    copies = {name: len(traced["float32_logits"]) for name, traced in across.items()}
    assert copies.pop(theirs["step"]) > 1
    assert not any(copies.values())
    assert in_step(theirs) > 2 * in_step(across["sft"])


def test_peak_is_the_logits_and_their_gradient(across: dict[str, dict[str, Any]]) -> None:
    first, second, third, *_ = across["spelling"]["at_peak"]
    assert [first["bytes"], second["bytes"]] == [LOGITS, LOGITS]
    assert first["made_in"].startswith("forward.py")
    assert second["made_in"].startswith("kd/sparse_logprobs.py")
    assert third["bytes"] < LOGITS
    assert in_step(across["spelling"]) < 2.75 * LOGITS


BROKEN = """
import ctypes, sys
if sys.argv[2]:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
import torch
from benchmarks import _traced

def looks(student, signal):
    if signal.top.logprobs.sum() > 0:
        raise AssertionError

def strays(student, signal):
    return student.lse + torch.zeros(len(student.lse))

whole = _traced.method

def broken(name, sizes):
    made = whole(name, sizes)
    made.select = select
    return made

_traced.register_attention()
_traced.method = broken
for select in (looks, strays):
    try:
        _traced.traced("exact", _traced.Sizes(("exact",), layers_t=1, layers_s=1))
    except Exception as error:
        print("found:", type(error).__name__, file=sys.stderr)
_traced.method = whole
_traced.main()
"""


def test_finds_a_look_at_values_a_tensor_that_strays_and_an_unknown_step(
    library: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_traced.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(TOOLS), str(TOOLS.parent))))
    monkeypatch.setattr("benchmarks.trace.HERE", tmp_path)
    with pytest.raises(OSError, match="unknown method 'golf'") as caught:
        trace([{"steps": ("golf",), **SHALLOW}], library)
    found = [line.split()[1] for line in str(caught.value).splitlines() if line.startswith("found:")]
    assert found == ["DataDependentOutputException", "FakeTensorDeviceMismatchError"]
