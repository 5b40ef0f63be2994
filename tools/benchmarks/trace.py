"""Trace whole training steps on CUDA tensors without a GPU: stray tensors, host syncs, peak memory."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._report import Line, Report

HERE = Path(__file__).resolve().parent
THEIRS = "sft of transformers"
"""The loss that a model of transformers makes of its labels."""
NOT_TRACED = ("byte-marginal",)
"""For small cases: it reads whole vocabularies at each position."""
SHARED = ("sft", "kl")
"""Of one tokenizer: the teacher then has the student's vocabulary."""
ON_POLICY = ("sampling", "spelling on samples")
AT_MOST = 1.15
SHOWN = 5
GIB = 2**30


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=4, help="rows of a batch (%(default)s)")
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of each row, all in groups (%(default)s)"
    )
    parser.add_argument("--layers-t", type=int, default=32, help="layers of the teacher (%(default)s)")
    parser.add_argument("--layers-s", type=int, default=24, help="layers of the student (%(default)s)")


def run(options: argparse.Namespace) -> Report:
    sizes = {"batch": options.batch, "length": options.length}
    full = sizes | {"layers_t": options.layers_t, "layers_s": options.layers_s}
    with tempfile.TemporaryDirectory() as folder:
        library = device_library(Path(folder))
        across, shared, shallow, single, on_policy = trace(
            [
                {"steps": _steps()} | full,
                {"steps": SHARED, "same_tokenizer": True} | full,
                {"steps": ("sft", "spelling", "gold"), "layers_t": 1, "layers_s": 1} | sizes,
                {"steps": ("sft", "spelling"), "mixed": False} | full,
                {"steps": (*ON_POLICY, "spelling")} | full,
            ],
            library,
        )
    lines = [
        *_against("two tokenizers", across),
        *_largest(next(step for step in across if step["step"] == "spelling")),
        *_against("one tokenizer", shared),
        *_against("1 layer each", shallow),
        _copies([*across, *shared, *shallow]),
        *_against("student in float32", single),
        *_sampling(*on_policy),
    ]
    facts = {
        "models": f"Llama-3-8B ({options.layers_t} layers, bfloat16) → Qwen2-0.5B ({options.layers_s} "
        "layers, weights in float32, mixed precision in bfloat16), AdamW",
        "batch": f"{options.batch} × {options.length:,} tokens unpadded, each a label and a group; default top k",
        "counted": "what operators give back and somebody holds; not what kernels and the allocator take",
    }
    return Report("tools/bench trace (FakeTensorMode on cuda; no data, no GPU)", facts, lines)


def _steps() -> list[str]:
    """List the steps of two tokenizers: all methods but those for one."""
    from cdm_toolkit import kd

    of_two = [name for name, each in kd.methods().items() if not each.same_tokenizer]
    return ["sft", THEIRS, *(name for name in of_two if name not in NOT_TRACED)]


def _against(name: str, steps: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Compare steps with the first, which is SFT + teacher: all bytes, and those of the step itself."""
    base, *others = steps
    own = base["peak"] - base["before"]
    lines = [
        Line(f"{name}, SFT + teacher: peak", base["peak"] / GIB, "GiB"),
        Line(f"{name}, SFT + teacher: of it in the step itself", own / GIB, "GiB"),
    ]
    for step in others:
        # what transformers does by itself is there to compare with
        at_most = AT_MOST if step["step"] != THEIRS else None
        in_step = step["peak"] - step["before"]
        what = f"{name}, {step['step']}"
        lines += [
            Line(f"{what}: peak", step["peak"] / GIB, "GiB"),
            Line(f"{what}: peak, of SFT + teacher's", step["peak"] / base["peak"], "×", at_most),
            Line(f"{what}: of both, in the step itself", in_step / own, "×", at_most),
        ]
    return lines


def _sampling(
    sampling: Mapping[str, Any], learned: Mapping[str, Any], step: Mapping[str, Any]
) -> Iterator[Line]:
    """Compare sampling, and a step that learns of samples, with a step of the data."""
    own = step["peak"] - step["before"]
    for name, each in (("sampling whole rows", sampling), ("spelling on samples", learned)):
        taken = each["peak"] - each["before"]
        yield Line(f"on-policy, {name}: of the peak", taken / GIB, "GiB")
        yield Line(f"on-policy, {name}: of a step of spelling's", taken / own, "×", 1.01)


def _copies(steps: Sequence[Mapping[str, Any]]) -> Line:
    """Count what mixed precision should not make."""
    count = sum(len(step["float32_logits"]) for step in steps if step["step"] != THEIRS)
    return Line("float32 tensors as large as the logits, in all steps of ours", count, "", 0)


def _largest(step: Mapping[str, Any]) -> list[Line]:
    return [
        Line(
            f"at {step['step']}'s peak: {tuple(held['shape'])} {held['dtype']}, "
            f"{held['made_in'] or held['operator']}",
            held["bytes"] / GIB,
            "GiB",
        )
        for held in step["at_peak"][:SHOWN]
    ]


def device_library(folder: Path) -> Path | None:
    """Compile what a CPU build of torch needs for a backward pass on CUDA tensors; None for other builds.

    FileNotFoundError without a C++ compiler.
    """
    import torch

    if torch.version.cuda is not None:
        return None
    compiler = os.environ.get("CXX", "g++")
    root, library = Path(torch.__file__).parent, folder / "fake_cuda.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", str(HERE / "_fake_cuda.cpp"), "-o", str(library)]
    command += [f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no C++ compiler {compiler}: install g++, or name one in the variable CXX"
        ) from None
    if done.returncode:
        raise OSError(f"{' '.join(command)} failed:\n{done.stderr}")
    return library


def trace(several: Sequence[Mapping[str, Any]], library: Path | None) -> list[list[dict[str, Any]]]:
    """Trace the steps of several `_traced.Sizes`; gives a `_traced.Traced` of each step of each, as plain values.

    OSError with what FakeTensorMode says where a step mixes devices or looks at values.
    """
    path = os.pathsep.join((str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, str(HERE / "_traced.py"), json.dumps(several), str(library or "")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise OSError(f"a step cannot be traced:\n{done.stderr}")
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return found
