"""LoKr, the whole method: ``y = W x + s (w1 ⊗ w2) x`` (Yeh et al. 2023, arXiv 2309.14859; Edalati et al. 2022, arXiv 2212.10650)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ...config import PeftType, WeightConfig
from ...core.mixed import Groups
from ...core.ranked import DroppingLayer
from ...core.tuner import BaseTuner
from ...kernels.kronecker import add_kronecker, kronecker_linear, kronecker_stacked
from ...kernels.splitting import factorization
from ...kernels.tucker import core_size, tucker


@dataclass
class LoKrConfig(WeightConfig):
    """Configuration of LoKr (LyCORIS: Yeh et al. 2023, arXiv 2309.14859; KronA: Edalati et al. 2022, arXiv 2212.10650).

    A layer ``y = W x`` becomes ``y = W x + s (w1 ⊗ w2) x`` with ``s = alpha / r``: w1 of shape (out₁, in₁) and w2 of shape
    (out₂, in₂) with out₁ out₂ = out_features and in₁ in₂ = in_features. Where r is small enough w2 is ``w2_a w2_b`` of rank r.

    Args:
        rank_pattern: Ranks that differ from ``r``, by name, suffix or regular expression.
        alpha_pattern: The same for ``alpha``.
        r: Rank of the factors that are low-rank products; one that is not smaller than half the larger side leaves them whole.
        alpha: Scale of the update before it is divided by ``r``.
        rank_dropout: Probability of dropping an output feature of the update in training.
        module_dropout: Probability of dropping the whole update of a layer in training.
        use_effective_conv2d: On convolutions with a kernel larger than 1, factor the kernel too.
        decompose_both: Make w1 a low-rank product too, where r is small enough.
        decompose_factor: Size of w1: out₁ and in₁ are this number, or the nearest divisor below it; -1: as near to square as can be.
        rank_dropout_scale: Divide what ``rank_dropout`` leaves by the share that it left.
        target_modules: Names or suffixes of the modules to adapt, a regular expression for the full name, or ``"all-linear"``;
            the model type's default when not given.
        exclude_modules: Names, suffixes or a regular expression of modules to leave out.
        init_weights: ``True``: w1 zero, w2 Kaiming-uniform; ``"lycoris"``: w2 zero instead; ``False``: both random, for tests only.
        layers_to_transform: Numbers of the layers to adapt.
        layers_pattern: Name of the list that holds the layers, where it is not found by itself.
        modules_to_save: Modules trained in full and saved with the adapter.
        w1_shapes: Shapes [out₁, in₁] of w1 that differ from what ``decompose_factor`` gives, by name, suffix or regular expression;
            some files of LyCORIS need it. Written only when set.

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
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | Literal["lycoris"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    w1_shapes: dict | None = field(default=None, kw_only=True)

    _optional_keys = (*WeightConfig._optional_keys, "w1_shapes")
    _pattern_fields = (*WeightConfig._pattern_fields, "w1_shapes")
    _pair_fields = ("w1_shapes",)

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOKR
        super().__post_init__()
        self.check_probability("rank_dropout")
        self.check_probability("module_dropout")
        if self.decompose_factor <= 0 and self.decompose_factor != -1:
            raise ValueError(f"`decompose_factor` should be a positive integer or -1, got {self.decompose_factor!r}.")


class LoKrLayer(DroppingLayer):
    """A layer with LoKr adapters.

    ``lokr_w1[name]`` has shape (out₁, in₁), or is the product of ``lokr_w1_a[name]`` (out₁, r) and ``lokr_w1_b[name]`` (r, in₁).
    ``lokr_w2[name]`` has shape (out₂, in₂, *kernel_size), or is the product of ``lokr_w2_a[name]`` (out₂, r) and
    ``lokr_w2_b[name]`` (r, in₂ · prod(kernel_size)). In the effective form of a convolution these are (r, out₂) and (r, in₂), beside
    ``lokr_t2[name]`` of shape (r, r, *kernel_size), with a 1 at the end in one dimension.
    """

    parameter_slots = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    other_param_names = (*DroppingLayer.other_param_names, "w1_shape")  # type: ignore[assignment]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.w1_shape: dict[str, tuple[int, int]] = {}

    def settings(self, config: LoKrConfig, target: str) -> dict[str, Any]:
        base = self.get_base_layer()
        rows, columns = self.kind.shape(base)
        sizes = rows, columns // math.prod(getattr(base, "kernel_size", ()))
        split = tuple(factorization(n, config.decompose_factor)[0] for n in sizes)
        shape = tuple(config.pattern_value("w1_shapes", target, split))
        if any(size % n for n, size in zip(shape, sizes, strict=True)):
            raise ValueError(f"w1_shapes gives it a w1 of shape {shape}, which does not divide the layer's {sizes}")
        return super().settings(config, target) | {"w1_shape": shape}

    def shapes(self, config: LoKrConfig, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        r, base = settings["r"], self.get_base_layer()
        rows, columns = self.kind.shape(base)
        kernel: tuple[int, ...] = getattr(base, "kernel_size", ())
        area = math.prod(kernel)
        out_1, in_1 = settings["w1_shape"]
        out_2, in_2 = rows // out_1, columns // area // in_1
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (out_1, in_1)}
        if config.decompose_both and 2 * r < max(out_1, in_1):
            shapes = {"lokr_w1_a": (out_1, r), "lokr_w1_b": (r, in_1)}
        if 2 * r >= max(out_2, in_2):
            return {**shapes, "lokr_w2": (out_2, in_2, *kernel)}
        if config.use_effective_conv2d and area > 1:
            return {**shapes, "lokr_w2_a": (r, out_2), "lokr_w2_b": (r, in_2), "lokr_t2": (r, r, *core_size(kernel))}
        return {**shapes, "lokr_w2_a": (out_2, r), "lokr_w2_b": (r, in_2 * area)}

    def start(self, tensors: dict[str, torch.Tensor], config: LoKrConfig, settings: dict[str, Any]) -> None:
        for tensor in tensors.values():
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        if config.init_weights is not False:
            whole, part = ("lokr_w2", "lokr_w2_b") if config.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
            tensors[whole if whole in tensors else part].zero_()

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """``w1``, and the factors of ``w2`` as a matrix (out₂, in₂ · prod(kernel_size)): the inner one, if any, and the outer."""
        w1, w2, core = (self.parameter(slot, name) for slot in ("lokr_w1", "lokr_w2", "lokr_t2"))
        if w1 is None:
            w1 = self.parameter("lokr_w1_a", name) @ self.parameter("lokr_w1_b", name)
        if w2 is not None:
            return w1, None, w2.flatten(1)
        outer, inner = self.parameter("lokr_w2_a", name), self.parameter("lokr_w2_b", name)
        return (w1, inner, outer) if core is None else (w1, tucker(core, inner), outer.mT)

    def delta(self, name: str, weight: torch.Tensor | None) -> torch.Tensor:
        w1, inner, outer = self.factors(name)
        if self._is_reordered(name):
            return torch.kron(w1, self.lokr_w2[name]).reshape(self.matrix_shape) * self.scaling[name]
        # In a convolution the kernel is the fastest index of the columns, so that this is its Kronecker product too.
        return torch.kron(w1, outer if inner is None else outer @ inner) * self.scaling[name]

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        w1, inner, outer = self.factors(name)
        if self.kind.is_matrix_product:
            return add_kronecker(y, self.cast_input(x, w1.dtype), w1, inner, outer, self.scaling[name], self.memo)
        if self.kind.takes_indices or self.get_base_layer().groups > 1 or self._is_reordered(name):
            return super().add(name, x, y)
        product = self._convolved(self.cast_input(x, w1.dtype), w1, inner, outer) * self.scaling[name]
        return product if y is None else y + product

    def _is_reordered(self, name: str) -> bool:
        """Whether the weight has the entries of w1 ⊗ w2 in another order: files pair w1 with the last two of a Conv1d's whole w2."""
        return self.kind.name == "Conv1d" and name in self.lokr_w2

    def whole(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        w1, inner, outer = self.factors(name)
        if self.drops(name) or not self.fits(x, weight, w1, outer):
            return None
        return kronecker_linear(x, weight, bias, w1, inner, outer, self.scaling[name], self.memo)

    def stack(self, names: Sequence[str], groups: Groups) -> tuple[torch.Tensor, ...] | None:
        if any(self.drops(name) for name in names):
            return None
        factors = [self.factors(name) for name in names]
        if len({(w1.shape, outer.shape, inner is None) for w1, inner, outer in factors}) > 1:
            return None
        w1, w2 = groups.lay([w1 for w1, *_ in factors], 0), groups.lay([outer for *_, outer in factors], 1)
        inner = [inner for _, inner, _ in factors if inner is not None]
        if inner:
            w2 = w2 @ groups.lay(inner, 2)
        return w1 * w1.new_tensor([self.scaling[name] for name in names])[:, None, None], w2

    def apply_stack(self, stack: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        return kronecker_stacked(x, *stack)

    def _convolved(
        self, x: torch.Tensor, w1: torch.Tensor, inner: torch.Tensor | None, outer: torch.Tensor
    ) -> torch.Tensor:
        """The convolution with ``w1 ⊗ (outer inner)``: the small kernel on each block of channels, then a mix of the blocks."""
        base: Any = self.get_base_layer()
        blocks_out, blocks_in = w1.shape
        channels = -1 - len(base.kernel_size)
        t = self.kind.product(base, x, (outer if inner is None else inner).repeat(blocks_in, 1))
        t = torch.tensordot(t.unflatten(channels, (blocks_in, -1)), w1, ([channels - 1], [1]))
        t = t.movedim(-1, channels - 1).flatten(channels - 1, channels)
        return t if inner is None else self.kind.mix(base, t, outer.repeat(blocks_out, 1))


class Linear(LoKrLayer):
    """LoKr on a linear layer."""


class Conv1d(LoKrLayer):
    """LoKr on a one-dimensional convolution."""


class Conv2d(LoKrLayer):
    """LoKr on a two-dimensional convolution."""


class LoKrModel(BaseTuner):
    """A base model with LoKr adapters (Yeh et al. 2023, arXiv 2309.14859); see :class:`~peft.core.tuner.BaseTuner`."""

    layer_cls = LoKrLayer
    layers = {"Linear": Linear, "Conv1D": Linear, "opaque linear": Linear, "Conv1d": Conv1d, "Conv2d": Conv2d}
    default_role = "attention"
    prefix = "lokr_"
