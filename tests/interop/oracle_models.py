"""The oracle's base models, inputs and numbers, the same in every process."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import BASES
from safetensors.torch import load_file, save_file
from torch import nn

import peft


class Perceptron(nn.Module):
    """A model that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.second = nn.Linear(32, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Convolutions(nn.Module):
    """Convolutions of every dimension, as far as the peer computes with them what they say: it passes over dilation and
    padding modes."""

    def __init__(self, grouped: bool = False) -> None:
        super().__init__()
        groups = 2 if grouped else 1
        self.line = nn.Conv1d(2, 8, 3, padding=1, groups=groups)
        self.plane = nn.Conv2d(8, 12, (2, 3), padding=(1, 0), stride=(2, 1), groups=groups)
        self.space = nn.Conv3d(12, 6, (1, 2, 2), padding="same", groups=groups)
        self.head = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.line(x.unflatten(1, (2, 6))))
        x = torch.tanh(self.plane(x.unflatten(2, (1, 6)).repeat(1, 1, 2, 1)))
        x = torch.tanh(self.space(x[:, :, None]))
        return self.head(x.flatten(1))


class GroupedConvolutions(Convolutions):
    """The same with groups."""

    def __init__(self) -> None:
        super().__init__(grouped=True)


def numbers(label: str, shape: Iterable[int]) -> torch.Tensor:
    """Standard normal numbers that depend on the label alone: numpy's old generator never changes its stream."""
    rng = np.random.RandomState(zlib.crc32(label.encode()))
    return torch.from_numpy(np.asarray(rng.standard_normal(tuple(shape)), dtype=np.float32))


def base_folder(name: str, bases: str) -> Path:
    """The folder of a base model, written at the first use. Two processes may race: both would write the same."""
    folder = Path(bases) / name
    if folder.exists():
        return folder
    spec = BASES[name]
    if spec.config is None:
        model = globals()[spec.model]()
    else:
        model = getattr(transformers, spec.model)(getattr(transformers, spec.config)(**spec.values))
    with torch.no_grad():
        for label, param in model.named_parameters():
            noise = numbers(f"{name}/{label}", param.shape)
            if param.ndim > 1:
                param.copy_(1.5 * noise / param.shape[-1] ** 0.5)
            else:
                param.copy_(0.1 * noise + (0.0 if label.endswith("bias") else 1.0))
    Path(bases).mkdir(parents=True, exist_ok=True)
    draft = tempfile.mkdtemp(dir=bases)
    if spec.config is None:
        save_file(model.state_dict(), os.path.join(draft, "model.safetensors"))
    else:
        model.save_pretrained(draft)
    with contextlib.suppress(OSError):  # the other process was first
        os.rename(draft, folder)
    return folder


def build_base(case: Any, bases: str, spoil: bool = False) -> nn.Module:
    """The case's base model as a user has it before adding adapters.

    Args:
        case: The row.
        bases: Folder of all base models.
        spoil: Give added vocabulary rows other values, so that only the adapter's file can bring the right ones.
    """
    spec, folder, dtype = BASES[case.base], base_folder(case.base, bases), getattr(torch, case.dtype)
    if spec.config is None:
        model = globals()[spec.model]()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.to(dtype).eval()
    model = getattr(transformers, spec.model).from_pretrained(str(folder), dtype=dtype)
    if case.new_tokens:
        old = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(old + case.new_tokens)
        with torch.no_grad():
            for label, param in model.named_parameters():
                if param.ndim == 2 and param.shape[0] == old + case.new_tokens:
                    fresh = numbers(label + ("/spoilt" if spoil else "/new"), param[old:].shape)
                    param[old:] = 1.5 * fresh / param.shape[-1] ** 0.5
    return model.eval()


def make_inputs(case: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Three rows of input, and labels."""
    spec, rng = BASES[case.base], np.random.RandomState(5)
    if spec.inputs == "vectors":
        return {"x": numbers("x", (3, 12)).to(getattr(torch, case.dtype))}, {}
    ids = torch.from_numpy(rng.randint(3, spec.values["vocab_size"] + case.new_tokens, (3, 7)))
    mask = torch.ones_like(ids)
    if spec.config == "BertConfig":
        mask[1, 5:] = 0  # padding on the right
        ids[1, 5:] = 0
    elif spec.inputs == "next":
        mask[1, :2] = 0  # padding on the left
        ids[1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if spec.inputs == "tokens":
        return inputs, {}
    if spec.inputs == "classes":
        return inputs, {"labels": torch.tensor([0, 2, 1])}
    if spec.inputs == "tags":
        return inputs, {"labels": torch.from_numpy(rng.randint(0, 3, (3, 7)))}
    if spec.inputs == "spans":
        return inputs, {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([3, 4, 1])}
    if spec.inputs == "next":
        return inputs, {"labels": ids.masked_fill(mask == 0, -100)}
    target = torch.from_numpy(rng.randint(3, spec.values["vocab_size"], (3, 4)))
    return inputs, {"labels": target}


def make_config(case: Any, adapter: Any) -> Any:
    """The config of one adapter, a fresh object."""
    values = copy.deepcopy(adapter.values)
    if "prefix_init" in inspect.signature(getattr(peft, adapter.method)).parameters:
        values["prefix_init"] = "peer"  # this library's own start is another
    return getattr(peft, adapter.method)(task_type=case.task, **values)
