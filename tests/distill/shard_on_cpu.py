"""`cdm` as `accelerate launch` starts it, on CPUs: accelerate shards on accelerators alone, and is told otherwise here.

What shards, and gloo, are torch's or DeepSpeed's own, as elsewhere. Where several processes run, the command runs again
with `--resume`, from its last checkpoint but one.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

from cdm_toolkit.cli import main
from cdm_toolkit.distill import run, trainer
from cdm_toolkit.errors import DoesNotSpell
from cdm_toolkit.kd import aligned_rows

OUTPUT = Path("both")
init, shard, align = AcceleratorState.__init__, trainer.shard_frozen, aligned_rows.align


def init_in_shards(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **more: Any) -> None:
    """Set FSDP or DeepSpeed up as if the CPU were an accelerator."""
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        more["cpu"] = False
    init(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def shard_and_tell(model: torch.nn.Module) -> None:
    """Say how much of a teacher a process keeps."""
    shard(model)
    parameters = list(model.parameters())
    kept = sum(each.to_local().numel() for each in parameters)
    sys.stderr.write(f"kept of a teacher: {kept / sum(each.numel() for each in parameters):.3f}\n")


def align_some(teacher: Any, student: Any, **more: Any) -> Any:
    """Refuse rows by their length, so that a batch of one process may have no group where that of another has."""
    if len(student) % 2:
        raise DoesNotSpell("teacher", 0, "a", b"b")
    return align(teacher, student, **more)


if __name__ == "__main__":
    AcceleratorState.__init__ = init_in_shards
    run.check_launch = lambda device: None
    trainer.shard_frozen = shard_and_tell
    aligned_rows.align = align_some

    status = main(sys.argv[1:])
    if status == 0 and torch.distributed.is_initialized():
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            shutil.copytree(OUTPUT, "whole")
            shutil.rmtree(max(OUTPUT.glob("checkpoint-*")))
            (OUTPUT / "model.safetensors").unlink()
        torch.distributed.barrier()
        status = main([*sys.argv[1:], "--resume"])
    sys.exit(status)
