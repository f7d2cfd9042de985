"""Two processes give the losses and the adapter of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

import tiny
from distributed_worker import SHARDED, train
from peft import get_peft_model_state_dict
from settings import ONE_EACH, ONE_EACH_IDS, SETTINGS

EXAMPLES = Path(__file__).parents[1] / "examples" / "accelerate"
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(WORKER),
        str(folder),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("setting", "base"), ONE_EACH, ids=ONE_EACH_IDS)
@pytest.mark.parametrize("form", ["", ", sharded"])
def test_training_equals_one_process(two_processes, setting, base, form):
    name = f"{setting.name}-{base.name}{form}"
    losses, model = train(setting, base)
    assert json.loads((two_processes / "losses.json").read_text())[name] == pytest.approx(losses, abs=1e-5)
    saved = load_file(two_processes / name / "adapter_model.safetensors")
    for key, tensor in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(saved[key], tensor, atol=1e-5, rtol=1e-4)


def test_sharded_training_equals_one_process(two_processes):
    told = json.loads((two_processes / "losses.json").read_text())["fully_shard"]
    losses, model = train(SHARDED, tiny.LLAMA)
    assert told["losses"] == pytest.approx(losses, abs=1e-5) and told["sharded"]
    saved = load_file(two_processes / "sharded" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model)
    assert list(saved) == sorted(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, atol=1e-5, rtol=1e-4)


def test_a_sharded_model_takes_an_adapter_from_a_file_and_stays_sharded(two_processes):
    told = json.loads((two_processes / "losses.json").read_text())["fully_shard"]
    assert told["missing"] == told["unexpected"] == []
    assert told["other weights, other outputs"] and told["same outputs after loading"] and told["still sharded"]
    assert told["a second adapter for inference"] < 1e-6


def test_what_a_sharded_model_refuses(two_processes):
    told = json.loads((two_processes / "losses.json").read_text())["fully_shard"]
    assert "its weight is sharded" in told["merge"]
    assert "Add adapters before the model is sharded" in told["add"]
    assert "The state dict given lacks 15 tensors" in told["partial"]
    assert not (two_processes / "partial").exists()


def test_a_tensor_shared_by_layers_that_are_sharded_apart_is_refused(two_processes):
    told = json.loads((two_processes / "losses.json").read_text())["shared"]
    assert "shared by layers that were sharded apart" in told and "`fully_shard(model)` alone" in told


@pytest.mark.parametrize("form", ["original parameters", "flat parameters"])
def test_the_older_fsdp_trains_and_refuses_to_save_parts(two_processes, form):
    told = json.loads((two_processes / "losses.json").read_text())["FSDP"][form]
    assert told["losses"] == pytest.approx(train(SETTINGS[0], tiny.LLAMA)[0], abs=1e-5)
    assert "sharded" in told["save"] and "ather" in told["save"]
    assert "Cannot merge" in told["merge"]
    assert "sharded already" in told["add"] or "cannot be adapted" in told["add"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_line_of_the_configurations(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    options = {action.dest for action in launch_command_parser()._actions}
    plugin = config.fsdp_config or {f"deepspeed_{k}": v for k, v in config.deepspeed_config.items()}
    assert config.num_processes == 2 and plugin
    assert {k.removeprefix("deepspeed_") for k in plugin} <= {o.removeprefix("deepspeed_") for o in options}
