"""A small job with transformers' Trainer: run by tests in their own process, and in one that is killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from peft import LoraConfig, get_peft_model

STEPS = 8


class Rows(Dataset):
    """Random token sequences, the same each time."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self.ids = torch.randint(3, tiny.VOCAB, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Die(TrainerCallback):
    """Kills the process after some steps, as `kill -9` does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(folder: str, die_at: int | None = None, **options) -> Trainer:
    """A trainer that saves every second step; dropout makes the random state count."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.LLAMA.build(), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.2))
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no", seed=3, **options,
    )  # fmt: skip
    callbacks = [Die(die_at)] if die_at is not None else []
    return Trainer(model, arguments, train_dataset=Rows(20), eval_dataset=Rows(4), callbacks=callbacks)


if __name__ == "__main__":
    trainer(sys.argv[1], die_at=5).train()
