"""The layer and the model of bottleneck adapters: ``y + s · (W_up f(W_down z + b_down) + b_up)``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core.layer import AdapterLayer
from ...core.targets import resolve_defaults
from ...core.tuner import BaseTuner
from ...kernels.linear import linear
from .config import DEFAULT_REDUCTION, activation, positive
from .places import PLACES

NEAR_IDENTITY = 0.02  # deviation of both projections with init="bert"


@dataclass(frozen=True)
class Shape:
    """What one adapter on one layer looks like.

    Args:
        width: Size of what it reads.
        dim: Width of the bottleneck.
        beside: Whether it reads an input rather than the layer's output.
        again: Whether the adapted norm runs again on the sum.
        dropout: Probability of dropping a feature of the bottleneck.
        phm_dim: n of Compacter, or ``None``.
    """

    width: int
    dim: int
    beside: bool
    again: bool
    dropout: float
    phm_dim: int | None


class BottleneckLayer(AdapterLayer):
    """A layer, a norm or a block with bottleneck adapters.

    ``bottleneck_down[name].weight`` has shape (dim, width) and ``bottleneck_up[name].weight`` (out_features, dim). For Compacter the
    n matrices A_i are ``bottleneck_phm_rule``, shape (2, n, n, n) for down and up, or ``bottleneck_phm_shared_rule``, (n, n, n), and
    the B_i ``…_left``, (n, rows / n, rank), times ``…_right``, (n, rank, columns / n); without a rank ``…_left`` alone.
    """

    linear_slots = ("bottleneck_down", "bottleneck_up")
    parameter_slots = (
        "bottleneck_down_bias", "bottleneck_up_bias", "bottleneck_norm_before", "bottleneck_norm_after", "bottleneck_gate",
        "bottleneck_gate_bias", "bottleneck_scale", "bottleneck_phm_rule", "bottleneck_phm_shared_rule",
        "bottleneck_phm_down_left", "bottleneck_phm_down_right", "bottleneck_phm_up_left", "bottleneck_phm_up_right",
    )  # fmt: skip
    shared_slots = ("bottleneck_phm_shared_rule",)
    other_param_names = ("bottleneck_shape", "bottleneck_act", "scaling")
    why_no_merge = "a bottleneck adapter is not linear, so no change of a weight equals it"
    attached_as = "bottleneck"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bottleneck_shape: dict[str, Shape] = {}
        self.bottleneck_act = nn.ModuleDict()
        self.scaling: dict[str, float] = {}

    # -- how an adapter is made --------------------------------------------------------------------------------------

    def settings(self, config: Any, target: str) -> dict[str, Any]:
        if not self.kind.features_last:
            raise ValueError(
                f"a bottleneck adapter works on the last dimension, which is not that of the channels of a {self.kind.name}"
            )
        beside = config.placement == "parallel"
        own_input = beside and self.input_of(config, target) is None
        if own_input and self.kind.takes_indices:
            raise ValueError("an adapter beside an embedding would read indices; use placement='houlsby' or 'pfeiffer'")
        width = self.in_features if own_input else self.out_features
        dim = config.pattern_value("bottleneck_dim_pattern", target, None)
        factor = config.pattern_value("reduction_factor_pattern", target, None)
        if dim is None and factor is None:
            dim, factor = config.bottleneck_dim, config.reduction_factor or DEFAULT_REDUCTION
        if dim is None:
            positive("reduction_factor", factor)
            dim = max(1, int(width // factor))
        positive("bottleneck_dim", dim, whole=True)
        n = config.phm_dim
        for what, size in (("bottleneck_dim", dim), ("the layer's width", width), ("its output", self.out_features)):
            if n is not None and size % n:
                raise ValueError(f"`phm_dim` {n} does not divide {what}, {size}; choose a divisor of both")
        is_norm = not self.kind.has_matrix and not self.is_attached
        again = is_norm and config.original_ln_after and not beside
        return {
            "bottleneck_shape": Shape(width, dim, beside, again, config.dropout, n),
            "bottleneck_act": activation(config.non_linearity),
            "scaling": 1.0 if config.scaling == "learned" else float(config.scaling),
        }

    def input_of(self, config: Any, target: str) -> str | None:
        if config.placement != "parallel":
            return None
        for pattern, template in (config.input_modules or {}).items():
            if (found := re.fullmatch(pattern, target)) is not None:
                return found.expand(template)
        return None

    def shapes(self, config: Any, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        shape: Shape = settings["bottleneck_shape"]
        width, dim, out, n, rank = shape.width, shape.dim, self.out_features, shape.phm_dim, config.phm_rank
        shapes: dict[str, tuple[int, ...]] = {}
        if n is None:
            shapes |= {"bottleneck_down": (dim, width), "bottleneck_up": (out, dim)}
        else:
            for way, rows, columns in (("down", width, dim), ("up", dim, out)):
                shapes[f"bottleneck_phm_{way}_left"] = (n, rows // n, columns // n if rank is None else rank)
                if rank is not None:
                    shapes[f"bottleneck_phm_{way}_right"] = (n, rank, columns // n)
            shapes |= (
                {"bottleneck_phm_shared_rule": (n, n, n)}
                if config.phm_shared
                else {"bottleneck_phm_rule": (2, n, n, n)}
            )
        shapes |= {"bottleneck_down_bias": (dim,), "bottleneck_up_bias": (out,)}
        if config.ln_before:
            shapes["bottleneck_norm_before"] = (2, width)
        if config.ln_after:
            shapes["bottleneck_norm_after"] = (2, out)
        if config.use_gating:
            shapes |= {"bottleneck_gate": (1, width), "bottleneck_gate_bias": (1,)}
        if config.scaling == "learned":
            shapes["bottleneck_scale"] = (1,)
        return shapes

    def start(self, tensors: dict[str, torch.Tensor], config: Any, settings: dict[str, Any]) -> None:
        shape: Shape = settings["bottleneck_shape"]
        near = config.init == "bert"
        for slot, tensor in tensors.items():
            if slot in ("bottleneck_norm_before", "bottleneck_norm_after"):
                tensor[0], tensor[1] = 1.0, 0.0  # weight, bias
            elif slot == "bottleneck_scale":
                tensor.fill_(1.0)
            elif slot.endswith("bias"):
                tensor.zero_()
            elif slot.endswith("rule"):  # so that the sum over i keeps the deviation of B_i
                tensor.normal_(std=1 / math.sqrt(tensor.shape[-1]))
            elif slot == "bottleneck_phm_down_right" or (slot == "bottleneck_phm_up_right" and near):
                tensor.normal_(std=1 / math.sqrt(tensor.shape[1]))  # likewise for the sum over the rank
            elif near or slot == "bottleneck_gate":
                tensor.normal_(std=NEAR_IDENTITY)
            elif slot == "bottleneck_up" or slot == _last_factor(tensors):
                tensor.zero_()
            else:  # Kaiming-uniform with a = √5, as linear layers start: the bound is 1 / √width
                bound = 1 / math.sqrt(shape.dim if "_up_" in slot else shape.width)
                tensor.uniform_(-bound, bound)

    # -- what it computes --------------------------------------------------------------------------------------------

    def after(self, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()) -> torch.Tensor:
        shape = self.bottleneck_shape[name]
        if not shape.again:
            return y + self.change(name, x if shape.beside else y)
        before = [n for n in earlier if self.bottleneck_shape[n].again]
        if before:
            y = self.base_layer(x)
        for other in (*before, name):
            x = (x + self.change(other, y)).to(x.dtype)
            y = self.base_layer(x)
        return y

    def change(self, name: str, z: torch.Tensor) -> torch.Tensor:
        """What an adapter adds.

        Args:
            name: The adapter.
            z: What it reads, (batch, …, width).

        Returns:
            (batch, …, out_features).
        """
        shape = self.bottleneck_shape[name]
        down, up = self.projections(name)
        z = self.cast_input(z, down.dtype)
        if name in self.bottleneck_norm_before:
            z = F.layer_norm(z, z.shape[-1:], *self.bottleneck_norm_before[name])
        hidden = self.bottleneck_act[name](linear(z, down, self.bottleneck_down_bias[name], self.memo))
        if shape.dropout and self.training:
            hidden = F.dropout(hidden, shape.dropout)
        out = F.linear(hidden, up, self.bottleneck_up_bias[name])
        if self.scaling[name] != 1.0:
            out = out * self.scaling[name]
        if name in self.bottleneck_scale:
            out = out * self.bottleneck_scale[name]
        if name in self.bottleneck_gate:
            out = out * torch.sigmoid(F.linear(z, self.bottleneck_gate[name], self.bottleneck_gate_bias[name]))
        if name in self.bottleneck_norm_after:
            out = F.layer_norm(out, out.shape[-1:], *self.bottleneck_norm_after[name])
        return out

    def projections(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """W_down, shape (dim, width), and W_up, shape (out_features, dim), of an adapter."""
        if name in self.bottleneck_down:
            return self.bottleneck_down[name].weight, self.bottleneck_up[name].weight
        rules: Any = (
            self.bottleneck_phm_rule[name]
            if name in self.bottleneck_phm_rule
            else (self.shared("bottleneck_phm_shared_rule", name),) * 2
        )
        return self._phm("down", name, rules[0]), self._phm("up", name, rules[1])

    def _phm(self, way: str, name: str, rule: torch.Tensor) -> torch.Tensor:
        """The transpose of ``sum_i A_i ⊗ B_i`` (Karimi Mahabadi et al. 2021, eq. 5 and 6)."""
        factor = getattr(self, f"bottleneck_phm_{way}_left")[name]
        right = getattr(self, f"bottleneck_phm_{way}_right")
        if name in right:
            factor = factor @ right[name]
        n, rows, columns = factor.shape
        return torch.einsum("ipq,irc->qcpr", rule.to(factor.device), factor).reshape(n * columns, n * rows)


def _last_factor(tensors: dict[str, torch.Tensor]) -> str:
    """The factor of W_up that is zero at the start."""
    return "bottleneck_phm_up_right" if "bottleneck_phm_up_right" in tensors else "bottleneck_phm_up_left"


class BottleneckModel(BaseTuner):
    """A base model with bottleneck adapters; see :class:`~peft.core.tuner.BaseTuner`."""

    layer_cls = BottleneckLayer
    prefix = "bottleneck_"

    @classmethod
    def find_defaults(cls, config: Any, model: nn.Module) -> set[str] | str:
        if config.target_modules is not None:
            return config.target_modules
        inputs: dict[str, str] = {}

        def look_up(model_type: str) -> str | None:
            if (places := PLACES.get(model_type)) is None:
                return None
            inputs.update(places.inputs)
            return places.targets(config.placement)

        targets = resolve_defaults(config, model, look_up, PLACES)
        if config.placement == "parallel" and config.input_modules is None:
            config.input_modules = inputs or None
        return targets
