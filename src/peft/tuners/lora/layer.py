"""LoRA's layer: ``y = W x + s B A x`` (Hu et al. 2021, arXiv 2106.09685, eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...core.kinds import has_plain_weight
from ...core.layer import AdapterLayer
from ...core.mixed import Groups
from ...core.ranked import ScaledLayer, of_one_size
from ...kernels.combining import pad_to
from ...kernels.low_rank import add_low_rank
from .dora import DORA
from .starts import as_plain, decompose, orthogonal, reads_weight
from .variants import PLAIN, Plain

FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""Keys of A and B in files, on layers with a product and on embeddings."""


class LoraLayer(ScaledLayer):
    """A layer with LoRA adapters.

    ``lora_A[name].weight`` has shape (r, in_features) and ``lora_B[name].weight`` (out_features, r); on embeddings the parameters
    ``lora_embedding_A[name]`` and ``lora_embedding_B[name]`` have these shapes. On convolutions A is a convolution with the layer's
    kernel, stride, padding and dilation, from in_channels to r, and B one with a kernel of 1 and the layer's groups. Adapters with
    ``use_dora`` have a value for each output feature in ``lora_magnitude_vector[name].weight``.
    """

    linear_slots = ("lora_A", "lora_B")
    parameter_slots = ("lora_embedding_A", "lora_embedding_B")
    zeros_do_nothing = True
    vector_slots = ("lora_magnitude_vector",)
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "lora_start", "use_dora", "lora_bias")

    lora_alpha: dict[str, float]
    lora_dropout: nn.ModuleDict
    lora_start: nn.ModuleDict
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._modules.update(lora_dropout=nn.ModuleDict(), lora_start=nn.ModuleDict())
        self.__dict__.update(lora_alpha={}, use_dora={}, lora_bias={})
        if getattr(self.get_base_layer(), "groups", 1) > 1:
            self.why_no_merge = (
                "LoRA's A reads all input channels of a grouped convolution, and its weight has no place for that; "
                "use the adapter unmerged"
            )

    def settings(self, config: Any, target: str) -> dict[str, Any]:
        r, alpha = self.rank_and_alpha(config, target, config.lora_alpha)
        self.correct_layout(config, target)
        variant_of(config.use_dora).check(self, config)
        if config.lora_bias and self.kind.takes_indices:
            raise ValueError(f"lora_bias=True is for layers with a product, not for a {self.kind.name}")
        scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        start = (
            {"lora_start": self._decompose(config.init_lora_weights, r, scaling)}
            if reads_weight(config.init_lora_weights)
            else {}
        )
        return start | {
            "r": r,
            "lora_alpha": alpha,
            "scaling": scaling,
            "lora_dropout": nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity(),
            "use_dora": config.use_dora,
            "lora_bias": config.lora_bias,
        }

    def shapes(self, config: Any, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        shapes = dict(zip(self._slots(), self.kind.factor_shapes(self.get_base_layer(), settings["r"]), strict=True))
        if config.lora_bias:
            shapes["lora_B.bias"] = (self.out_features,)
        return shapes | variant_of(config.use_dora).shapes(self)

    def start(self, tensors: dict[str, torch.Tensor], config: Any, settings: dict[str, Any]) -> None:
        a, b = (tensors[slot] for slot in self._slots())
        if "lora_start" in settings:
            a.copy_(settings["lora_start"].a.view(a.shape))
            b.copy_(settings["lora_start"].b.view(b.shape))
        elif config.init_lora_weights == "orthogonal":
            orthogonal(a.flatten(1), b.flatten(1))
        else:
            self._start_at_zero(a, b, config.init_lora_weights)
        if config.lora_bias:
            tensors["lora_B.bias"].zero_()
        change = None
        if config.init_lora_weights is False:
            change = self.kind.combine(self.get_base_layer(), b.flatten(1), a.flatten(1)) * settings["scaling"]
        variant_of(config.use_dora).start(self, tensors, change)

    def _start_at_zero(self, a: torch.Tensor, b: torch.Tensor, start: bool | str) -> None:
        random, zero = (b, a) if self.kind.takes_indices else (a, b)  # as the authors do on embeddings
        if self.kind.takes_indices:
            random.normal_()
        elif start == "gaussian":
            random.normal_(std=1 / a.shape[0])
        else:
            nn.init.kaiming_uniform_(random, a=math.sqrt(5))
        zero.zero_()
        if start is False:  # not the identity: for tests
            if self.kind.takes_indices:
                zero.normal_()
            else:
                nn.init.kaiming_uniform_(zero, a=math.sqrt(5))

    def _decompose(self, start: str, rank: int, scaling: float) -> nn.Module:
        base: Any = self.get_base_layer()
        if not has_plain_weight(base) or self.kind.factor_shapes(base, rank)[1][1] != rank:
            raise ValueError(
                f"init_lora_weights={start!r} decomposes the layer's weight, but that of this {type(base).__name__} is no single "
                "plain float matrix (quantised, or a grouped convolution). Use init_lora_weights=True there"
            )
        return decompose(start, self.kind.to_matrix(base, base.weight.detach()), rank, scaling)

    def variant(self, name: str) -> Plain:
        """How an adapter acts."""
        return variant_of(self.use_dora[name])

    def needs_weight(self, name: str) -> bool:
        return self.variant(name).needs_weight

    def delta(self, name: str, weight: torch.Tensor | None) -> torch.Tensor:
        return self.variant(name).delta(self, name, weight)

    def delta_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        return self.lora_B[name].bias * self.scaling[name] if self.lora_bias[name] else None

    def after(self, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()) -> torch.Tensor:
        return self.variant(name).after(self, name, x, y, earlier)

    def change(self, name: str) -> torch.Tensor:
        """s B A of an adapter, of shape ``matrix_shape``."""
        a, b = self.factors(name)
        return self.kind.combine(self.get_base_layer(), b, a) * self.scaling[name]

    def add_change(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + s B A x of an adapter, with its dropout on x."""
        a, b, scale = self.scaled_factors(name)
        x, rate = self.cast_input(x, a.dtype), 0.0
        if self.kind.is_matrix_product:
            x, rate = self.dropout_of(name, x)
        elif not self.kind.takes_indices:
            x = self.lora_dropout[name](x)
        y = self.add_factors(x, y, a, b, scale, rate)
        bias = self.delta_bias(name, None)
        return y if bias is None else y + self.kind.channels(self.get_base_layer(), bias)

    def after_tied(
        self, layer: AdapterLayer, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()
    ) -> torch.Tensor:
        if self.variant(name) is not PLAIN:
            return super().after_tied(layer, name, x, y, earlier)
        a, b, scale = self.scaled_factors(name)
        if layer.kind.transposed != self.kind.transposed:
            a, b = b.T, a.T
        x = layer.cast_input(x, a.dtype)
        if layer.kind.is_matrix_product:
            x, rate = self.dropout_of(name, x)
            return add_low_rank(y, x, a, b, scale, rate)
        base = layer.get_base_layer()
        return y + layer.kind.mix(base, layer.kind.product(base, x, a), b) * scale

    def repeated(self, layer: AdapterLayer, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        here, there = (FACTORS[k.takes_indices] for k in (self.kind, layer.kind))
        if self.variant(name) is not PLAIN or not all(key in tensors for key in here):
            return {}
        a, b = (tensors[key] for key in here)
        if layer.kind.transposed != self.kind.transposed:
            a, b = b.T, a.T
        return {key: t.clone(memory_format=torch.contiguous_format) for key, t in zip(there, (a, b), strict=True)}

    def whole(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if self.lora_bias[name] else self.variant(name).whole(self, name, x, weight, bias)

    def stack(self, names: Sequence[str], groups: Groups) -> tuple[torch.Tensor, ...] | None:
        if self.training and any(type(self.lora_dropout[name]) is not nn.Identity for name in names):
            return None
        inner, outer, scales = zip(*(self.scaled_factors(name) for name in names), strict=True)
        stacked = groups.lay(of_one_size(outer, 1), 1)
        return groups.lay(of_one_size(inner, 0), 0), stacked.mul_(stacked.new_tensor(scales)[:, None, None])

    def after_groups(self, groups: Groups, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        names = self.present(groups)
        if any(self.lora_bias[name] for name in names):
            return None
        changed = super().after_groups(groups, x, y)
        magnified = {name for name in names if self.use_dora[name]}
        return DORA.scale_groups(self, groups, magnified, changed) if magnified and changed is not None else changed

    def dropout_of(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The adapter's input and the rate at which the kernel is to drop it; a user's own module is applied here."""
        dropout = self.lora_dropout[name]
        if type(dropout) is nn.Identity:
            return x, 0.0
        if type(dropout) is nn.Dropout:
            return x, dropout.p if dropout.training else 0.0
        return dropout(x), 0.0

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of an adapter's change over s: A, shape (r, columns of the weight's matrix), and B, shape (out_features, r).

        Where it is measured against a start (PiSSA, OLoRA) they are those of ``B A − B₀ A₀``, of rank 2r.
        """
        a, b = self.own_factors(name)
        if name not in self._modules["lora_start"]:  # type: ignore[operator]
            return a, b
        start: Any = self.lora_start[name]
        return as_plain(a, b, start.a, start.b)

    def own_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of an adapter as matrices, what they are measured against left in."""
        if self.kind.takes_indices:
            return self.lora_embedding_A[name], self.lora_embedding_B[name]
        modules: Any = self._modules  # in mixed batches the time that attributes take shows
        a, b = modules["lora_A"][name].weight, modules["lora_B"][name].weight
        return (a, b) if a.dim() == 2 else (a.flatten(1), b.flatten(1))

    def scaled_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A, B and the factor of their product; a scale kept as a tensor (see :meth:`make_room`) is in B already."""
        a, b = self.factors(name)
        scale = self.scaling[name]
        return (a, b * scale, 1.0) if isinstance(scale, torch.Tensor) else (a, b, scale)

    def _slots(self) -> tuple[str, str]:
        return ("lora_embedding_A", "lora_embedding_B") if self.kind.takes_indices else ("lora_A", "lora_B")

    # -- starts that were read off the weight ----------------------------------------------------------------------

    def has_moved(self, name: str) -> bool:
        """Whether an adapter with a start is no longer at it."""
        start: Any = self.lora_start[name]
        a, b = self.own_factors(name)
        rank = self.r[name]
        return not (torch.equal(a[:rank], start.a.to(a)) and torch.equal(b[:, :rank], start.b.to(b)))

    def leave_out(self, names: Sequence[str]) -> None:
        """Take the parts that these adapters started from out of the base weight, for good."""
        base: Any = self.get_base_layer()
        with torch.no_grad():
            for name in names:
                start: Any = self.lora_start[name]
                part = self.kind.combine(base, start.b, start.a) * self.scaling[name]
                base.weight.sub_(self.kind.from_matrix(base, part).to(base.weight))

    # -- being replaced while in use -------------------------------------------------------------------------------

    def retune(self, name: str, settings: dict[str, Any]) -> None:
        # The dropout module stays: compiled code knows it, and configurations that may replace one another agree in it.
        self.r[name], self.lora_alpha[name] = settings["r"], settings["lora_alpha"]
        self.rescale(name, settings["scaling"])
        self._start_scaling.pop(name, None)
        if "lora_start" in settings:
            self.lora_start[name] = settings["lora_start"]
        elif name in self.lora_start:
            del self.lora_start[name]

    def make_room(self, rank: int | None, *, dry_run: bool = False) -> None:
        for name in self.adapter_names():
            a, b = (self.get_parameter(self.own_key(slot, name)) for slot in self._slots())
            wide = a.shape[0] if rank is None else rank
            if wide < a.shape[0]:
                raise ValueError(
                    f"target_rank={rank} is smaller than the rank {a.shape[0]} of adapter {name!r}. Give the largest rank of all "
                    "adapters to come."
                )
            for tensor, shape in zip((a, b), self.kind.factor_shapes(self.get_base_layer(), wide), strict=True):
                if not dry_run:
                    tensor.data = _with_room(tensor.data, shape, self._groups(name) if tensor is a else 1)
            if not dry_run:
                # A number would be a constant of compiled code; a tensor is an input.
                self.scaling[name] = torch.tensor(float(self.scaling[name]), device=a.device, dtype=a.dtype)

    def into_room(self, name: str, slot: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if slot not in self._slots() or not isinstance(self.scaling[name], torch.Tensor):
            return value  # nothing is compiled: the parameter takes the new shape
        if any(new > old for new, old in zip(value.shape, shape, strict=True)):
            raise ValueError(
                f"The new adapter's rank does not fit: {tuple(value.shape)} into {tuple(shape)}. Give "
                "prepare_model_for_compiled_hotswap a target_rank as large as the largest rank to come."
            )
        return _with_room(value, shape, self._groups(name) if slot == self._slots()[0] else 1)

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        # Room for larger ranks is no part of the adapter.
        a_slot, b_slot = self._slots()
        for file_key, own_key, tensor in super().adapter_tensors(name):
            if isinstance(self.scaling.get(name), torch.Tensor):
                groups = self._groups(name)
                if own_key == self.own_key(a_slot, name):
                    tensor = tensor.unflatten(0, (groups, -1))[:, : self.r[name] // groups].flatten(0, 1)
                elif own_key == self.own_key(b_slot, name):
                    tensor = tensor[:, : self.r[name] // groups]
            yield file_key, own_key, tensor

    def _groups(self, name: str) -> int:
        """Into how many groups A's rows fall, for B's rows to read one each: more than one on grouped convolutions."""
        a, b = (self.get_parameter(self.own_key(slot, name)) for slot in self._slots())
        return a.shape[0] // b.shape[1]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be written as plain LoRA: it is, unless it has magnitudes."""
        return not self.use_dora.get(adapter_name, False)


def variant_of(use_dora: bool) -> Plain:
    """The variant that a configuration asks for."""
    return DORA if use_dora else PLAIN


def _with_room(factor: torch.Tensor, shape: Sequence[int], groups: int) -> torch.Tensor:
    """A factor filled up with zeros to a shape; its rows fall into groups that are filled up each."""
    sizes = (groups, shape[0] // groups, *shape[1:])
    return pad_to(factor.unflatten(0, (groups, -1)), sizes).flatten(0, 1)


class Linear(LoraLayer):
    """LoRA on a linear layer."""


class Embedding(LoraLayer):
    """LoRA on an embedding."""


class Conv1d(LoraLayer):
    """LoRA on ``nn.Conv1d``."""


class Conv2d(LoraLayer):
    """LoRA on ``nn.Conv2d``."""


class Conv3d(LoraLayer):
    """LoRA on ``nn.Conv3d``."""
