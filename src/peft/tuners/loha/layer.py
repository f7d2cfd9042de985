"""LoHa, the whole method: ``y = W x + s ((w1_a w1_b) ⊙ (w2_a w2_b)) x`` (Hyeon-Woo et al. 2021, arXiv 2108.06098)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...config import PeftType, WeightConfig
from ...core.mixed import Groups
from ...core.ranked import DroppingLayer
from ...core.tuner import BaseTuner
from ...kernels.hadamard import Hadamard, factors_are_cheaper, hadamard, hadamard_stacked, khatri_rao_factors
from ...kernels.low_rank import low_rank_linear
from ...kernels.reweighted import may_reweight, reweighted_linear
from ...kernels.tucker import core_size, tucker


@dataclass
class LoHaConfig(WeightConfig):
    """Configuration of LoHa (FedPara: Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS: Yeh et al. 2023, arXiv 2309.14859).

    A layer ``y = W x`` becomes ``y = W x + s ((w1_a w1_b) ⊙ (w2_a w2_b)) x`` with ``s = alpha / r`` (proposition 1 of the first):
    an update of rank up to r² from twice the parameters of a LoRA of rank r. W stays frozen.

    Args:
        rank_pattern: Ranks that differ from ``r``, by name, suffix or regular expression.
        alpha_pattern: The same for ``alpha``.
        r: Rank of each of the two products.
        alpha: Scale of the update before it is divided by ``r``.
        rank_dropout: Probability of dropping an output feature of the update in training; the others are scaled up in turn.
        module_dropout: Probability of dropping the whole update of a layer in training.
        use_effective_conv2d: On convolutions with a kernel larger than 1, factor the kernel too (proposition 3).
        target_modules: Names or suffixes of the modules to adapt, a regular expression for the full name, or ``"all-linear"``;
            the model type's default when not given.
        exclude_modules: Names, suffixes or a regular expression of modules to leave out.
        init_weights: ``True``: ``w2_b`` zero and the others Kaiming-uniform; ``False``: none zero, for tests only.
        layers_to_transform: Numbers of the layers to adapt.
        layers_pattern: Name of the list that holds the layers, where it is not found by itself.
        modules_to_save: Modules trained in full and saved with the adapter.

    Raises:
        ValueError: A field has an impossible value.
    """

    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOHA
        super().__post_init__()
        self.check_probability("rank_dropout")
        self.check_probability("module_dropout")


class LoHaLayer(DroppingLayer):
    """A layer with LoHa adapters.

    With the weight seen as a matrix (rows, columns): ``hada_w1_a[name]`` and ``hada_w2_a[name]`` have shape (rows, r),
    ``hada_w1_b[name]`` and ``hada_w2_b[name]`` (r, columns). In the effective form of a convolution these are (r, out_channels) and
    (r, in_channels), beside ``hada_t1[name]`` and ``hada_t2[name]`` of shape (r, r, *kernel_size), with a 1 at
    the end in one dimension.
    """

    parameter_slots = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def shapes(self, config: LoHaConfig, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        r, base = settings["r"], self.get_base_layer()
        rows, columns = self.kind.shape(base)
        kernel: tuple[int, ...] = getattr(base, "kernel_size", ())
        if not config.use_effective_conv2d or math.prod(kernel) == 1:
            return dict(zip(self.parameter_slots[:4], ((rows, r), (r, columns)) * 2, strict=True))
        pair = ((r, rows), (r, columns // math.prod(kernel)))
        core = (r, r, *core_size(kernel))
        return dict(zip(self.parameter_slots, (*pair, *pair, core, core), strict=True))

    def start(self, tensors: dict[str, torch.Tensor], config: LoHaConfig, settings: dict[str, Any]) -> None:
        for tensor in tensors.values():
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        if config.init_weights:
            tensors["hada_w2_b"].zero_()

    def factors(self, name: str) -> tuple[torch.Tensor, ...]:
        """``w1_a``, ``w1_b``, ``w2_a`` and ``w2_b`` of an adapter, of shapes (rows, r) and (r, columns)."""
        w1_a, w1_b, w2_a, w2_b, core_1, core_2 = (self.parameter(slot, name) for slot in self.parameter_slots)
        if core_1 is None:
            return w1_a, w1_b, w2_a, w2_b
        return w1_a.mT, tucker(core_1, w1_b), w2_a.mT, tucker(core_2, w2_b)

    def delta(self, name: str, weight: torch.Tensor | None) -> torch.Tensor:
        return hadamard(*self.factors(name)) * self.scaling[name]

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        if not self._factors_pay(name, x):
            return super().add(name, x, y)
        inner, outer = khatri_rao_factors(*self.factors(name))
        return self.add_factors(self.cast_input(x, inner.dtype), y, inner, outer, self.scaling[name])

    def whole(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        factors = self.factors(name)
        if self.drops(name) or not self.fits(x, weight, *factors):
            return None
        tokens = x.numel() // max(x.shape[-1], 1)
        if Hadamard.pays(tokens, self.out_features, self.in_features, self.r[name]) and may_reweight(
            x, weight, factors
        ):
            return reweighted_linear(Hadamard(self.scaling[name]), x, weight, bias, factors, self.memo)
        if not self._factors_pay(name, x):
            return None
        return low_rank_linear(x, weight, bias, *khatri_rao_factors(*factors), self.scaling[name], memo=self.memo)

    def stack(self, names: Sequence[str], groups: Groups) -> tuple[torch.Tensor, ...] | None:
        if any(self.drops(name) for name in names) or len({self.r[name] for name in names}) > 1:
            return None
        slots = enumerate(self.parameter_slots[:4])
        w1_a, w1_b, w2_a, w2_b = (groups.lay([self.parameter(slot, n) for n in names], i) for i, slot in slots)
        scales = w2_a.new_tensor([self.scaling[name] for name in names])[:, None, None]
        return w1_a, w1_b, torch.mul(w2_a.mT, scales, out=w2_a.new_empty(w2_a.mT.shape)), w2_b

    def apply_stack(self, stack: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] <= stack[0].shape[2]:
            return hadamard_stacked(x, *stack)
        w1_a, w1_b, w2_a_t, w2_b = stack
        return super().apply_stack(khatri_rao_factors(w1_a, w1_b, w2_a_t.mT, w2_b), x)

    def moves_factors(self, stack: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor) -> bool:
        return False  # what is made of them is many times larger

    def _factors_pay(self, name: str, x: torch.Tensor) -> bool:
        """Whether it is cheaper to apply the update than to build ΔW for this input."""
        tokens = x.numel() if self.kind.takes_indices else x.numel() // self.in_features
        if getattr(self.get_base_layer(), "groups", 1) > 1:
            return False
        return factors_are_cheaper(tokens, *self.kind.shape(self.get_base_layer()), self.r[name])


class Linear(LoHaLayer):
    """LoHa on a linear layer."""


class Conv1d(LoHaLayer):
    """LoHa on a one-dimensional convolution."""


class Conv2d(LoHaLayer):
    """LoHa on a two-dimensional convolution."""


class LoHaModel(BaseTuner):
    """A base model with LoHa adapters (Hyeon-Woo et al. 2021, arXiv 2108.06098); see :class:`~peft.core.tuner.BaseTuner`."""

    layer_cls = LoHaLayer
    layers = {"Linear": Linear, "Conv1D": Linear, "opaque linear": Linear, "Conv1d": Conv1d, "Conv2d": Conv2d}
    default_role = "attention"
    prefix = "hada_"
