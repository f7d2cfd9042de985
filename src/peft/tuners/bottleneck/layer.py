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
from ...core.mixed import Groups
from ...core.targets import resolve_defaults
from ...core.tuner import BaseTuner
from ...kernels.linear import Source, linear
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
            return y + (
                self.change(name, x) if shape.beside else self.change(name, y, None if earlier else self._source(x))
            )
        before = [n for n in earlier if self.bottleneck_shape[n].again]
        if before:
            y = self.base_layer(x)
        for other in (*before, name):
            x = (x + self.change(other, y)).to(x.dtype)
            y = self.base_layer(x)
        return y

    def _source(self, x: torch.Tensor) -> Source | None:
        """The base layer and its input as what makes the adapter's input, where it is a plain linear layer; whole batches alone,
        since products of some rows may differ in the last bit."""
        if self.is_attached or self._shared.plan is not None:
            return None
        operands = self.kind.operands(self.base_layer)
        return None if operands is None else Source(x, *operands)

    def change(self, name: str, z: torch.Tensor, source: Source | None = None) -> torch.Tensor:
        """What an adapter adds.

        Args:
            name: The adapter.
            z: What it reads, (batch, …, width).
            source: What made it, where that is known.

        Returns:
            (batch, …, out_features).
        """
        shape = self.bottleneck_shape[name]
        down, up = self.projections(name)
        z = self.cast_input(z, down.dtype)
        if name in self.bottleneck_norm_before:
            z, source = F.layer_norm(z, z.shape[-1:], *self.bottleneck_norm_before[name]), None
        hidden = self.bottleneck_act[name](linear(z, down, self.bottleneck_down_bias[name], self.memo, source))
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
        return phm(*self._phm_factors("down", name)), phm(*self._phm_factors("up", name))

    def _phm_factors(self, way: str, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The A_i of an adapter, and its B_i or the factors of these."""
        left = self.parameter(f"bottleneck_phm_{way}_left", name)
        if name in self.bottleneck_phm_rule:
            rule = self.bottleneck_phm_rule[name][0 if way == "down" else 1]
        else:
            rule = self.shared("bottleneck_phm_shared_rule", name).to(left.device)
        return rule, left, self.parameter(f"bottleneck_phm_{way}_right", name)

    # -- mixed batches without a graph -------------------------------------------------------------------------------

    def after_groups(self, groups: Groups, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        names = groups.once((self, "present"), lambda: [name for name in groups.names if self.has_adapter(name)])
        alike = groups.once((self, "alike"), lambda: len({self._form(name) for name in names}) == 1)
        if not alike or (self.training and self.bottleneck_shape[names[0]].dropout):
            return None
        down, down_bias, up, up_bias = groups.once(self, lambda: self._stack(groups, names))
        z = self.attachment.read(names[0], x) if self.bottleneck_shape[names[0]].beside else y
        z = groups.split(self.cast_input(z, down.dtype))
        hidden = self.bottleneck_act[names[0]](torch.baddbmm(down_bias.unsqueeze(1), z, down.mT))
        return y + groups.join(torch.baddbmm(up_bias.unsqueeze(1), hidden, up.mT), y.shape)

    def _form(self, name: str) -> Any:
        """Adapters with the same form differ in the values of their projections and scales alone; an object of its own for one that
        has more than these."""
        shape, slots = self.bottleneck_shape[name], ("norm_before", "norm_after", "gate")
        if shape.again or any(name in getattr(self, f"bottleneck_{slot}") for slot in slots):
            return object()
        act = self.bottleneck_act[name]
        phm = tuple(name in getattr(self, f"bottleneck_phm_{slot}") for slot in ("rule", "down_right", "up_right"))
        return shape, type(act), act.extra_repr(), self.attachment.sources.get(name), phm

    def _stack(self, groups: Groups, names: Sequence[str]) -> list[torch.Tensor]:
        """Both projections of several adapters with their biases, (groups, …), those of W_up scaled; zeros for absent adapters."""
        if names[0] in self.bottleneck_down:
            down = groups.lay([self.bottleneck_down[name].weight for name in names], 0)
            up = groups.lay([self.bottleneck_up[name].weight for name in names], 1)
        else:
            factors = ([self._phm_factors(way, name) for name in names] for way in ("down", "up"))
            down, up = (_side_by_side(f) for f in factors)
        scales = up.new_tensor([self.scaling[name] for name in names])[:, None]
        if self.bottleneck_scale:
            ones = up.new_ones(1)
            scales = scales * torch.stack([dict(self.bottleneck_scale.items()).get(name, ones) for name in names])
        down_bias, up_bias = (
            torch.stack([slot[name] for name in names]) for slot in (self.bottleneck_down_bias, self.bottleneck_up_bias)
        )
        stack = (down, down_bias, up * scales.unsqueeze(2), up_bias * scales)
        return [groups.spread(tensor, names) for tensor in stack]


def _side_by_side(factors: Sequence[Any]) -> torch.Tensor:
    rule, left, right = zip(*factors, strict=True)
    return phm(torch.stack(rule), torch.stack(left), None if right[0] is None else torch.stack(right))


def phm(rule: torch.Tensor, left: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:
    """The transpose of ``sum_i A_i ⊗ B_i`` (Karimi Mahabadi et al. 2021, arXiv 2106.04647, eq. 5 and 6).

    Args:
        rule: The A_i, (…, n, n, n), with any dimensions in front, for several sums at once.
        left: The B_i, (…, n, rows / n, columns / n), or their left factors.
        right: The right factors of the B_i, if they have factors.

    Returns:
        (…, columns, rows).
    """
    b = left if right is None else left @ right
    return torch.einsum("...ipq,...irc->...qcpr", rule, b).flatten(-2).flatten(-3, -2)


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
