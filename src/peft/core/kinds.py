"""Kinds of layers: how the engine reads the weight of a layer and applies another weight in the same geometry.

Every kind presents its layer as a matrix of shape ``(rows, columns)``, whatever the layer's own layout: a row for each output
feature, a column for each number that the feature is computed from. For layers without a kernel these are the input features.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .sharding import is_sharded

PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LayerKind:
    """How one kind of layer is seen. Subclass and pass to :func:`register_kind` to support more kinds."""

    name = ""
    takes_indices = False
    """Whether the layer's input is a tensor of indices, which can be neither scaled nor dropped out."""

    transposed = False
    """Whether the matrix is the transpose of the weight as the layer stores it."""

    has_matrix = True
    """Whether the layer has a weight that can be seen as a matrix; without one only its output can be worked on."""

    features_last = True
    """Whether features are the last dimension of the layer's input and output."""

    is_matrix_product = False
    """Whether the layer computes ``x Wᵀ`` over the last dimension, so that kernels for matrices apply."""

    def matches(self, layer: nn.Module) -> bool:
        """Whether the layer is of this kind."""
        raise NotImplementedError

    def shape(self, layer: Any) -> tuple[int, int]:
        """``(rows, columns)`` of the weight as a matrix."""
        raise NotImplementedError

    def features(self, layer: Any) -> tuple[int, int]:
        """``(out_features, in_features)``: sizes of the channel dimension of the layer's output and input."""
        return self.shape(layer)

    def to_matrix(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        """A tensor in the layer's own layout, seen as ``(rows, columns)``; a view where possible."""
        return weight

    def from_matrix(self, layer: Any, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_matrix`."""
        return matrix

    def product(self, layer: Any, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """What the layer would give for ``x`` with this weight, shape ``(n, columns)``, and without its bias.

        A grouped convolution also takes a matrix with columns for all input channels: it then is as if without groups.
        """
        raise NotImplementedError

    def mix(self, layer: Any, t: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Mix the channels of a product ``t`` by a matrix of shape ``(out_features, channels of t)``."""
        return F.linear(t, matrix)

    def operands(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight, (out_features, in_features), and bias of a layer that computes ``x Wᵀ + b`` and nothing else, so that a kernel
        may stand in for its forward; ``None`` for every other layer."""
        return None

    def combine(self, layer: Any, outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """The matrix whose product is that of ``inner``, shape (n, columns), mixed by ``outer``."""
        return outer @ inner

    def channels(self, layer: Any, vector: torch.Tensor) -> torch.Tensor:
        """A value for each channel, shaped to broadcast against the layer's output (or input, for as many values)."""
        return vector

    def columns(self, layer: Any, vector: torch.Tensor) -> torch.Tensor:
        """A value for each input feature, shaped to broadcast against the matrix: scaling by it scales the input."""
        return vector[None]

    def factor_shapes(self, layer: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two factors of an update of this rank as modules keep them: the inner reads the layer's input."""
        rows, columns = self.shape(layer)
        return (rank, columns), (rows, rank)

    def factor(self, layer: Any, weight: torch.Tensor, *, inner: bool) -> nn.Module:
        """A module around one factor, with the key ``weight`` and without a bias.

        Args:
            layer: The layer.
            weight: The factor, of a shape from :meth:`factor_shapes`.
            inner: Whether it is the one that reads the layer's input.
        """
        return Factor(weight)

    def check_rows(self, layer: Any, x: torch.Tensor) -> None:
        """Refuse an input whose first dimension is not the batch.

        Raises:
            ValueError: Its rows cannot be given to different adapters.
        """

    def why_not_mergeable(self, layer: Any) -> str | None:
        """Why nothing can be merged into this layer's weight, or ``None`` where it can."""
        weight = layer.weight
        if weight.device.type == "meta":
            return "its weight is on the meta device (offloaded, or not loaded yet)"
        if type(weight.data) is not torch.Tensor or is_sharded(weight):
            return f"its weight is sharded or of a special type ({type(weight.data).__name__}); gather it first"
        if "weight" not in layer._parameters and "weight" not in layer._buffers:
            return "its weight is computed from other parameters (weight normalisation, a parametrisation); remove that first"
        return None


class Factor(nn.Linear):
    """A bias-free ``nn.Linear`` made around a given weight, without drawing random numbers first."""

    def __init__(self, weight: torch.Tensor) -> None:
        nn.Module.__init__(self)
        out_features, in_features = weight.shape
        self.__dict__.update(out_features=out_features, in_features=in_features)
        self._parameters.update(weight=nn.Parameter(weight, requires_grad=weight.is_floating_point()), bias=None)

    def _get_name(self) -> str:
        return "Linear"


class Vector(nn.Module):
    """A module that holds one parameter, ``weight``."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())


class LinearKind(LayerKind):
    """``nn.Linear``: ``y = x Wᵀ + b`` with W of shape (out_features, in_features)."""

    name = "Linear"
    is_matrix_product = True

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and has_plain_weight(layer)

    def shape(self, layer: nn.Linear) -> tuple[int, int]:
        # Read from the weight: layers are resized without their attributes being told.
        out_features, in_features = layer.weight.shape if layer.weight.dim() == 2 else (0, 0)
        return out_features or layer.out_features, in_features or layer.in_features

    def product(self, layer: nn.Linear, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return F.linear(x, matrix)

    def operands(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        if not self._own_forward(layer) or "forward" in layer.__dict__ or has_hooks(layer):
            return None
        return self.to_matrix(layer, layer.weight), layer.bias

    def _own_forward(self, layer: nn.Module) -> bool:
        return type(layer) is nn.Linear


class Conv1DKind(LinearKind):
    """transformers' ``Conv1D``, a linear layer whose weight is stored as (in_features, out_features)."""

    name = "Conv1D"
    transposed = True

    def matches(self, layer: nn.Module) -> bool:
        return is_transformers_conv1d(layer) and has_plain_weight(layer)

    def shape(self, layer: Any) -> tuple[int, int]:
        in_features, out_features = layer.weight.shape
        return out_features, in_features

    def _own_forward(self, layer: nn.Module) -> bool:
        return type(layer) is conv1d_class()

    def to_matrix(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def from_matrix(self, layer: Any, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T


class EmbeddingKind(LayerKind):
    """``nn.Embedding``: a lookup in a weight stored as (num_embeddings, embedding_dim); in_features is num_embeddings."""

    name = "Embedding"
    takes_indices = True
    transposed = True

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding) and has_plain_weight(layer)

    def shape(self, layer: nn.Embedding) -> tuple[int, int]:
        return layer.weight.shape[1], layer.weight.shape[0]

    def to_matrix(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def from_matrix(self, layer: Any, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T

    def product(self, layer: nn.Embedding, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(
            x, matrix.T, padding_idx=layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq, sparse=layer.sparse
        )
        scale = embedding_scale(layer)
        return rows if scale is None else rows * scale.to(rows.dtype)

    def why_not_mergeable(self, layer: Any) -> str | None:
        if layer.max_norm is not None:
            return "its max_norm renormalises the weight on every use"
        return super().why_not_mergeable(layer)


class ConvKind(LayerKind):
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``; the matrix is (out_channels, in_channels / groups · prod(kernel_size)).

    Args:
        layer_cls: Which of them.
    """

    features_last = False

    def __init__(self, layer_cls: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]) -> None:
        self.layer_cls = layer_cls
        self.name = layer_cls.__name__
        self.dims = int(self.name[-2])
        self.convolve: Any = getattr(F, self.name.lower())

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, self.layer_cls) and has_plain_weight(layer)

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    def features(self, layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels

    def to_matrix(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def from_matrix(self, layer: Any, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.reshape(matrix.shape[0], -1, *layer.kernel_size)

    def product(self, layer: Any, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        weight = self.from_matrix(layer, matrix)
        groups = layer.in_channels // weight.shape[1]
        return self.convolve(x, weight, None, layer.stride, padding, layer.dilation, groups)

    def mix(self, layer: Any, t: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        # A matrix with fewer columns than there are channels mixes within groups.
        groups = t.shape[-1 - self.dims] // matrix.shape[1]
        return self.convolve(t, matrix.reshape(*matrix.shape, *(1,) * self.dims), groups=groups)

    def combine(self, layer: Any, outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        groups = inner.shape[0] // outer.shape[1]
        return (outer.unflatten(0, (groups, -1)) @ inner.unflatten(0, (groups, -1))).flatten(0, 1)

    def channels(self, layer: Any, vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(-1, *(1,) * self.dims)

    def columns(self, layer: Any, vector: torch.Tensor) -> torch.Tensor:
        by_group = vector.reshape(layer.groups, -1).repeat_interleave(math.prod(layer.kernel_size), 1)
        return by_group if layer.groups == 1 else by_group.repeat_interleave(layer.out_channels // layer.groups, 0)

    def factor_shapes(self, layer: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if rank % layer.groups:
            raise ValueError(
                f"the layer is a {self.name} of {layer.groups} groups, which do not divide the rank {rank}; choose a multiple"
            )
        return (
            (rank, layer.in_channels, *layer.kernel_size),
            (layer.out_channels, rank // layer.groups, *(1,) * self.dims),
        )

    def factor(self, layer: Any, weight: torch.Tensor, *, inner: bool) -> nn.Module:
        geometry: dict[str, Any] = {"kernel_size": 1, "groups": layer.groups}
        if inner:
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            geometry = {"groups": 1} | {name: getattr(layer, name) for name in names}
        channels = weight.shape[1] * geometry["groups"]
        with torch.device("meta"):  # draws no random numbers
            module = self.layer_cls(channels, weight.shape[0], bias=False, **geometry)
        module.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
        return module

    def check_rows(self, layer: Any, x: torch.Tensor) -> None:
        if x.dim() != self.dims + 2:
            raise ValueError(
                f"`adapter_names` needs a batch, but a {self.name} got an input of shape {tuple(x.shape)}, whose first dimension "
                "is that of the channels. Give it an input with a batch dimension."
            )


class OpaqueLinearKind(LayerKind):
    """A linear layer whose weight is no plain float matrix (quantised): only its output can be added to."""

    name = "opaque linear"
    is_matrix_product = True

    def matches(self, layer: nn.Module) -> bool:
        return (
            not isinstance(layer, (nn.Embedding, nn.Bilinear))
            and isinstance(getattr(layer, "in_features", None), int)
            and isinstance(getattr(layer, "out_features", None), int)
            and not has_plain_weight(layer)
        )

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    def product(self, layer: Any, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return F.linear(x, matrix)

    def why_not_mergeable(self, layer: Any) -> str | None:
        dtype = getattr(getattr(layer, "weight", None), "dtype", "unknown")
        return f"its weight is no plain float matrix but {dtype} (quantised?); dequantise the model first"


class ModuleKind(LayerKind):
    """Any other module, a norm or a whole block, seen by its output alone: (…, width), or a tuple that begins with it."""

    name = "module"
    has_matrix = False

    def matches(self, layer: nn.Module) -> bool:
        from transformers import PreTrainedModel

        # A further child would run as one more step of a container; whole models give a dictionary.
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention)
        return not isinstance(layer, (*containers, PreTrainedModel))

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        width = _width(layer)
        return width, width


def _width(module: nn.Module) -> int:
    """Size of the last dimension of what a module gives.

    A norm has one weight for each feature. A block that begins or ends with a norm has its width; any other ends with the linear
    layer that was registered last.

    Raises:
        ValueError: It cannot be told.
    """
    for layer in (module, *module.children()):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 1:
            return weight.shape[0]
    for layer in reversed(list(module.modules())):
        kind = kind_of(layer)
        if kind is not None and kind.features_last and not kind.takes_indices:
            return kind.shape(layer)[0]
    raise ValueError(
        f"it is a {type(module).__name__}, and how wide its output is cannot be told: it has neither a norm nor a linear layer"
    )


_KINDS: list[LayerKind] = [
    LinearKind(),
    Conv1DKind(),
    EmbeddingKind(),
    ConvKind(nn.Conv1d),
    ConvKind(nn.Conv2d),
    ConvKind(nn.Conv3d),
    OpaqueLinearKind(),
]


_MODULE = ModuleKind()


def register_kind(kind: LayerKind) -> None:
    """Support one more kind of layer, in every method. Later registrations are asked first."""
    _KINDS.insert(0, kind)


def kind_of(layer: nn.Module, any_module: bool = False) -> LayerKind | None:
    """The kind of a layer, or ``None`` where it is not supported.

    Args:
        layer: The layer.
        any_module: Whether modules without a matrix will do.
    """
    kinds = [*_KINDS, _MODULE] if any_module else _KINDS
    return next((kind for kind in kinds if kind.matches(layer)), None)


def supported_kinds() -> list[str]:
    """Names of all supported kinds."""
    return [kind.name for kind in _KINDS]


def has_plain_weight(layer: nn.Module) -> bool:
    """Whether the layer's weight is a float tensor that can be read as numbers."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dtype in PLAIN_DTYPES


def has_hooks(layer: nn.Module) -> bool:
    """Whether calling the layer runs anything besides its forward."""
    own = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(own) or torch.nn.modules.module._has_any_global_hook()


def is_transformers_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is transformers' ``Conv1D``."""
    return isinstance(layer, conv1d_class())


@cache
def conv1d_class() -> type[nn.Module]:
    """transformers' ``Conv1D``, imported at its first use, which costs time, and then kept."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def embedding_scale(layer: nn.Module) -> torch.Tensor | None:
    """The factor by which some models (Gemma, BART) multiply what an embedding gives, if there is one."""
    scale = getattr(layer, "embed_scale", None)
    if scale is None:
        return None
    return scale if isinstance(scale, torch.Tensor) else torch.tensor(scale)
