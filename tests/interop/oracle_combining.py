"""The oracle's combined adapters: every way to combine two, with fixed weights in, and what comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from oracle_names import describe_error
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
from peft.utils import merge_utils


class Kinds(nn.Module):
    """One layer of each kind, to look at their weights only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 12)
        self.conv1d = Conv1D(10, 12)
        self.conv2d = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Never called here."""
        raise NotImplementedError


def combined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What each row's combination gives: ΔW, rank and scaling by layer, the configuration, what is active; or an error."""
    return {row["name"]: _attempt(row) for row in rows}


def on_tensors() -> dict[str, Any]:
    """What the functions of ``peft.utils.merge_utils`` make of fixed tensors and fixed random numbers."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(6, 5, generator=generator) for _ in range(3)]
    tensors[0][0], tensors[1][0], tensors[2][0] = 1.0, -1.0, 0.0  # draws
    stacked, weights, told = torch.stack(tensors), torch.tensor([1.0, -0.5, 2.0]), {}

    def note(name: str, function: Callable[..., torch.Tensor], *arguments: Any) -> None:
        torch.manual_seed(5)
        told[name] = function(*arguments).float().tolist()

    for density in (0.0, 0.3, 0.9):
        note(f"magnitude {density}", merge_utils.prune, tensors[1], density, "magnitude")
        note(f"random {density}", merge_utils.prune, tensors[1], density, "random")
        note(f"random, rescaled {density}", merge_utils.prune, tensors[1], density, "random", density > 0)
        note(f"magnitude_prune {density}", merge_utils.magnitude_prune, tensors, weights, density)
    note("dare_linear", merge_utils.dare_linear, tensors, weights, 0.4)
    note("task_arithmetic", merge_utils.task_arithmetic, tensors, weights)
    for method in ("total", "frequency"):
        note(f"signs by {method}", merge_utils.calculate_majority_sign_mask, stacked, method)
        mask = merge_utils.calculate_majority_sign_mask(stacked, method)
        note(f"disjoint_merge by {method}", merge_utils.disjoint_merge, stacked, mask)
        note(f"ties by {method}", merge_utils.ties, tensors, weights, 0.6, method)
        note(f"dare_ties by {method}", merge_utils.dare_ties, tensors, weights, 0.4, method)
    return told


def _attempt(row: dict[str, Any]) -> dict[str, Any]:
    both = {"target_modules": ["embedding", "linear", "conv1d", "conv2d"], "r": 4, "lora_alpha": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(0)
            model = peft.get_peft_model(Kinds(), peft.LoraConfig(**{**both, **row.get("first", {})}), "one").eval()
            model.add_adapter("two", peft.LoraConfig(**{**both, **row.get("second", {})}))
            generator = torch.Generator().manual_seed(3)
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            torch.manual_seed(7)
            model.add_weighted_adapter(row.get("adapters", ["one", "two"]), row["weights"], "new", **row["options"])
        except Exception as error:
            return {"error": describe_error(error)}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight") and "new" in m.scaling}
    return {
        "deltas": {n: m.get_delta_weight("new").tolist() for n, m in layers.items()},
        "trains": any(p.requires_grad for n, p in model.named_parameters() if ".new." in f"{n}."),
        "active": list(model.active_adapters),
        "targets": str(sorted(model.peft_config["new"].target_modules)),
        "ranks": {n: m.r["new"] for n, m in layers.items()},
    }
