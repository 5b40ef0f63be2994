"""Models in shards, a part in each process: what `accelerate launch` was told, and the teachers, which are frozen."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cdm_toolkit.errors import BadOption

if TYPE_CHECKING:
    from torch import nn


def is_sharded() -> bool:
    """Say whether `accelerate launch` was told to keep the student in shards, by FSDP or DeepSpeed."""
    return _told("ACCELERATE_USE_FSDP") or _told("ACCELERATE_USE_DEEPSPEED")


def check_launch(device: str) -> None:
    """See that this process has a device of its own, and that accelerate will do as it was told. Raises BadOption."""
    import torch

    kind, many = torch.device(device).type, torch.cuda.device_count()
    # a cluster's own launcher may show each process its GPU alone; torch's shows all of them to all
    processes = int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if kind == "cuda" and processes > many:
        raise BadOption("num_processes", processes, f"{many}, the GPUs here")
    if not is_sharded():
        return
    if kind == "cpu":
        raise BadOption(
            "device", device, "cuda: on CPUs accelerate shards nothing, so launch without its file"
        )
    if _told("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise BadOption("fsdp_version", os.environ.get("FSDP_VERSION", "1"), "2")
    if _told("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        allowed = "false: the teachers' weights would be in the first process alone"
        raise BadOption("fsdp_cpu_ram_efficient_loading", True, allowed)


def device_to_load_on(device: str) -> str:
    """Name the device that models are loaded on: what is to be in shards would fill a GPU while it is whole.

    It is also kept from transformers, which would load each model in the shards of ZeRO-3, teachers too: such a teacher
    does not run, and the first process would wait for the others, which wait for it.
    """
    if not is_sharded():
        return device
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    return "cpu"


def shard_frozen(model: nn.Module) -> None:
    """Keep a part of each layer of a model without gradients in each process; a layer is whole while it runs.

    From then on every process has to run the model as often as the others.
    """
    from torch.distributed.fsdp import fully_shard

    kinds = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in kinds:
            fully_shard(module)
    fully_shard(model, reshard_after_forward=True)


def _told(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
