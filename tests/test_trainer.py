"""transformers' Trainer and accelerate: what is interrupted goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import Trainer

import tiny
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights
from trainer_worker import STEPS, trainer

WORKER = Path(__file__).with_name("trainer_worker.py")


def weights(source: Trainer | torch.nn.Module) -> dict[str, torch.Tensor]:
    model = source.model if isinstance(source, Trainer) else source
    return {k: v.detach().clone() for k, v in get_peft_model_state_dict(model).items()}


def test_a_killed_run_that_resumes_equals_one_that_was_not_killed(tmp_path):
    run = subprocess.run([sys.executable, str(WORKER), str(tmp_path / "killed")], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr[-2000:]
    assert sorted(os.listdir(tmp_path / "killed")) == ["checkpoint-2", "checkpoint-4"]
    whole = trainer(str(tmp_path / "whole"))
    whole.train()
    resumed = trainer(str(tmp_path / "killed"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    for key, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[key], tensor, atol=1e-6, rtol=1e-5)
    files = [
        load_file(tmp_path / run / f"checkpoint-{STEPS}" / "adapter_model.safetensors") for run in ("whole", "killed")
    ]
    assert list(files[0]) == list(files[1])


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    # The loss falls, so that the greatest one is the first: not what the model holds when training ends.
    job = trainer(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    job.train()
    best = Path(job.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    stored, last = (
        load_peft_weights(best, device="cpu"),
        load_peft_weights(tmp_path / f"checkpoint-{STEPS}", device="cpu"),
    )
    held = weights(job)
    assert all(torch.equal(held[k], v) for k, v in stored.items())
    assert not all(torch.equal(held[k], v) for k, v in last.items())


def test_accelerate_saves_and_restores_the_state(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(tiny.LLAMA.build(), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.2)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    inputs = tiny.LLAMA.inputs()

    def steps():
        for _ in range(2):
            accelerator.backward(model(**inputs, labels=inputs["input_ids"]).loss)
            optimizer.step()
            optimizer.zero_grad()
        return weights(accelerator.unwrap_model(model))

    steps()
    accelerator.save_state(str(tmp_path))
    expected = steps()
    steps()
    accelerator.load_state(str(tmp_path))
    again = steps()
    assert all(torch.equal(again[k], v) for k, v in expected.items())
