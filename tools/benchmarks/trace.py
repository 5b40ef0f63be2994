"""Memory of one training step on CUDA, by method, traced without a GPU at Llama-3-8B → Qwen2-0.5B.

FakeTensorMode makes CUDA tensors without data: a tensor on another device, or a look at values on the device,
raises. The backward pass over them needs a C++ compiler, for `_fake_cuda.cpp`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._report import Line, Report

HERE = Path(__file__).resolve().parent
ACROSS = ("cdm", "em", "mined", "prefix", "uld", "alm", "gold")
SHARED = ("kl", "reverse-kl", "jsd")
LIMIT = 1.15
"""A method's peak over that of SFT after a forward pass of the teacher."""


def compiled(folder: Path) -> Path:
    """Compile what lets a CPU build of torch go backward over CUDA tensors."""
    import torch

    root, library = Path(torch.__file__).parent, folder / "fake_cuda.so"
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        str(HERE / "_fake_cuda.cpp"),
        "-o",
        str(library),
    ]
    command += [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def trace(library: Path, steps: Sequence[str], **sizes: Any) -> list[dict[str, Any]]:
    """Trace steps in a process of their own; `sizes` are those of `_traced.Sizes`."""
    arguments = json.dumps({"steps": list(steps)} | sizes)
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parents[1]}"}
    command = [sys.executable, str(HERE / "_traced.py"), arguments, str(library)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, metavar="N", help="of both models; by default all of theirs")


def run(options: Namespace) -> Report:
    layers = {} if options.layers is None else {"layers_t": options.layers, "layers_s": options.layers}
    lines, largest = [], {}
    with tempfile.TemporaryDirectory(prefix="cdm-trace-") as folder:
        library = compiled(Path(folder))
        for methods, same in ((ACROSS, False), (SHARED, True)):
            baseline, theirs, *of_methods = trace(
                library, ("sft", "sft of transformers", *methods), same_tokenizer=same, **layers
            )
            named = f"SFT + teacher of {'one tokenizer' if same else 'two tokenizers'}"
            lines.append(Line(named, baseline["peak"] / 2**30, "GiB"))
            lines.append(Line(f"{named}, transformers' own loss", theirs["peak"] / 2**30, "GiB"))
            for traced in of_methods:
                lines += _lines(traced, baseline)
            largest |= {f"largest at the peak of {t['step']}": _largest(t) for t in of_methods[:1]}
    facts = {
        "step": "batch 4 × 1,024, all tokens labels and groups, k 100, bfloat16 autocast, AdamW, teacher in bfloat16",
        "logits": "4,092 × 152,064 of the student, 4,092 × 128,256 of the teacher",
        **largest,
    }
    return Report("Live tensor bytes at the peak of a training step on CUDA", facts, lines)


def _lines(traced: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[Line]:
    name = traced["step"]
    return [
        Line(name, traced["peak"] / 2**30, "GiB"),
        Line(f"{name}, of SFT + teacher", traced["peak"] / baseline["peak"], "×", at_most=LIMIT),
        Line(f"{name}, float32 tensors as large as logits", len(traced["float32_logits"]), "", at_most=0),
    ]


def _largest(traced: Mapping[str, Any]) -> str:
    parts = [
        f"{held['bytes'] / 2**20:,.0f} MiB {held['dtype']} {tuple(held['shape'])} {held['made_in']}".strip()
        for held in traced["at_peak"][:5]
    ]
    return "; ".join(parts)
