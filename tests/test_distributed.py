"""Two processes give the losses and the adapter of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed_worker import train
from peft import get_peft_model_state_dict
from settings import ONE_EACH, ONE_EACH_IDS

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
def test_data_parallel_training_equals_one_process(two_processes, setting, base):
    name = f"{setting.name}-{base.name}"
    losses, model = train(setting, base)
    assert json.loads((two_processes / "losses.json").read_text())[name] == pytest.approx(losses, abs=1e-5)
    saved = load_file(two_processes / name / "adapter_model.safetensors")
    for key, tensor in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(saved[key], tensor, atol=1e-5, rtol=1e-4)
