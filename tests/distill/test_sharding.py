"""Student and teachers in shards: what is told before a run, the files for accelerate, runs of two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.artifacts.shipped import shipped_folder
from cdm_toolkit.distill.output_folder import check_seal
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.run import run
from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.distill.sharding import check_launch
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.errors import BadOption, CdmError, DoesNotSpell
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.kd import aligned_rows

LAUNCH = shipped_folder("recipes") / "accelerate"
ON_CPU = Path(__file__).with_name("shard_on_cpu.py")


@pytest.fixture(autouse=True)
def as_started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what a launcher sets."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def environment(file: Path) -> dict[str, str]:
    """Ask accelerate what it tells the processes that it launches with a file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "cdm_toolkit.cli"])
    arguments, config, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        told = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        told = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_knows_every_field_of_the_files(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(file))  # refuses what it does not know, but for the inner fields
    options = vars(launch_command_parser().parse_args(["-m", "x"]))
    assert (config.fsdp_config | config.deepspeed_config).keys() <= options.keys()
    assert config.num_processes == 8
    assert (
        f"accelerate launch --config_file {file.name} -m cdm_toolkit.cli distill run.yaml" in file.read_text()
    )


def test_what_accelerate_makes_of_the_file_for_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    for name, value in environment(LAUNCH / "fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert not plugin.cpu_ram_efficient_loading
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    check_launch("cuda")


def test_what_accelerate_makes_of_the_file_for_deepspeed() -> None:
    told = environment(LAUNCH / "deepspeed-zero3.yaml")
    prefix = "ACCELERATE_DEEPSPEED_"
    assert {name: told[prefix + name] for name in ("ZERO_STAGE", "ZERO3_INIT", "ZERO3_SAVE_16BIT_MODEL")} == {
        "ZERO_STAGE": "3",
        "ZERO3_INIT": "false",
        "ZERO3_SAVE_16BIT_MODEL": "true",
    }
    assert told["ACCELERATE_GRADIENT_CLIPPING"] == told["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    check_launch("cuda")  # each may see another one
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    check_launch("cpu")
    with pytest.raises(BadOption, match=r"^`num_processes` is 8; give 4, the GPUs here$"):
        check_launch("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_launch("cuda")


@pytest.mark.parametrize(
    ("told", "device", "message"),
    [
        ({}, "cpu", "`device` is 'cpu'; give cuda: on CPUs accelerate shards nothing"),
        ({"FSDP_VERSION": "1"}, "cuda", "`fsdp_version` is '1'; give 2"),
        (
            {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "cuda",
            "`fsdp_cpu_ram_efficient_loading` is True; give false",
        ),
    ],
)
def test_what_cannot_be_in_shards_is_told(
    told: dict[str, str], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | told).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadOption) as caught:
        check_launch(device)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"device": "cpu"},
            "`teachers.0.device` is 'cpu'; give nothing there: teachers in memory are in shards",
        ),
        ({"device_map": "auto"}, "`teachers.0.device_map` is 'auto'; give nothing there"),
        ({"quantization": "8bit"}, "`teachers.0.quantization` is '8bit'; give nothing there"),
        ({"model": "quantised"}, "it is quantised (gptq), and the run keeps models in shards"),
    ],
    ids=str,
)
def test_teachers_that_cannot_be_in_shards_are_told(
    teacher: dict[str, str], message: str, config, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "quantization" in teacher:
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    description = json.loads(Path(shutil.copytree(tiny.teacher, "quantised"), "config.json").read_text())
    description["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    Path("quantised/config.json").write_text(json.dumps(description))
    settings = config({"teachers": [{"model": tiny.teacher, "top_k": 40} | teacher]})
    with pytest.raises(CdmError) as caught:
        prepare(settings, Rows(settings.data.all_sources, 0), lambda _: None)
    assert message in str(caught.value)


def logged(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "provenance.json").read_text())["losses"]
    return found


def lines(output: Path) -> list[tuple[float, ...]]:
    return [
        (log["step"], log["loss"], log["ce"], log["teachers"][0]["kd"], log["grad_norm"])
        for log in logged(output)
    ]


def align_some(teacher: Any, student: Any, **more: Any) -> Any:
    """Refuse rows by their length, as `shard_on_cpu` does."""
    if len(student) % 2:
        raise DoesNotSpell("teacher", 0, "a", b"b")
    return align(teacher, student, **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "fsdp2.yaml",
        pytest.param(
            "deepspeed-zero3.yaml",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
        ),
    ],
)
def test_two_processes_in_shards_have_the_losses_of_one(
    file: str, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With clipping, accumulated gradients, two alphas, and rows that do not align: a process then asks no teacher."""
    train = {"grad_accumulation": 2, "max_steps": 4, "lr": 3e-3, "max_grad_norm": 0.5, "device": "cpu"}
    settings: dict[str, Any] = {
        "student": tiny.student,
        "data": {"sources": [{"path": tiny.data, "alpha": 0.2, "limit": 4}, {"path": tiny.data}]},
        "teachers": [{"model": tiny.teacher, "top_k": 40}],
        "train": train | {"log_every": 1, "save_every": 2},
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(aligned_rows, "align", align_some)
    settings["train"]["batch_size"] = 4
    run(from_mapping(settings | {"output": "alone"}))
    settings["train"]["batch_size"] = 2
    Path("run.yaml").write_text(yaml.safe_dump(settings | {"output": "both"}))
    launch = ["accelerate.commands.launch", "--config_file", LAUNCH / file, "--num_processes", "2"]
    launched = subprocess.run(
        [sys.executable, "-m", *launch, "--main_process_port", "0", ON_CPU, "distill", "run.yaml"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stderr.count("kept of a teacher: 0.5") == 4, "two processes, twice"
    alone, whole, resumed = map(Path, ("alone", "whole", "both"))
    for one, both in zip(lines(alone), lines(whole), strict=True):
        assert both == pytest.approx(one, abs=1e-5)
    assert all(0 < log["teachers"][0]["aligned_share"] < 0.8 for log in logged(whole))

    check_seal(resumed / "checkpoint-2")
    shards = [path for path in resumed.glob("checkpoint-2/*/*") if path.suffix in (".distcp", ".pt")]
    assert len(shards) == 4, f"weights and optimizer of each process: {shards}"
    assert lines(resumed) == lines(whole)
    of_one, of_both, gone_on = (load_file(path / "model.safetensors") for path in (alone, whole, resumed))
    assert of_one.keys() == of_both.keys() == gone_on.keys()
    for name, weights in of_both.items():
        assert torch.equal(weights, gone_on[name])
        assert torch.allclose(weights, of_one[name], atol=1e-4)
    assert torch.equal(
        load_model("both").get_output_embeddings().weight, of_both["model.embed_tokens.weight"]
    )
