"""Layers whose adapters have a rank and a scale: patterns, verbs for the scale, and dropping parts of an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.combining import pad_to
from ..kernels.low_rank import add_low_rank
from .layer import AdapterLayer
from .mixed import Groups


class ScaledLayer(AdapterLayer):
    """A layer whose adapters have a rank ``r`` and a factor ``scaling`` on their update, which can be changed at run time."""

    r: dict[str, int]
    scaling: dict[str, Any]  # numbers, or tensors of one where compiled code is to read them
    _start_scaling: dict[str, float]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.__dict__.update(r={}, scaling={}, _start_scaling={})

    @staticmethod
    def rank_and_alpha(config: Any, target: str, alpha: float) -> tuple[int, float]:
        """Rank and alpha of a module: those of the configuration, or what its patterns say.

        Args:
            config: Configuration with ``r``, ``rank_pattern`` and ``alpha_pattern``.
            target: Full name of the module.
            alpha: The configuration's alpha.

        Raises:
            ValueError: The rank is no positive integer.
        """
        r = config.pattern_value("rank_pattern", target, config.r)
        if isinstance(r, bool) or not isinstance(r, int) or r <= 0:
            raise ValueError(f"the rank should be a positive integer, got {r!r}")
        return r, config.pattern_value("alpha_pattern", target, alpha)

    def add_factors(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        inner: torch.Tensor,
        outer: torch.Tensor,
        scale: float,
        rate: float = 0.0,
    ) -> torch.Tensor:
        """``y + scale · outer (inner x)`` in the layer's geometry, without building the product of the factors.

        Args:
            x: The layer's input.
            y: Its output so far; nothing is added to where it is ``None``.
            inner: (n, columns of the weight).
            outer: (rows of the weight, n).
            scale: Factor of the product.
            rate: Probability of dropping an element of ``x``, for layers that are plain matrix products.
        """
        if self.kind.is_matrix_product and y is not None:
            return add_low_rank(y, x, inner, outer, scale, rate, self.memo)
        base = self.get_base_layer()
        product = self.kind.mix(base, self.kind.product(base, x, inner), outer) * scale
        return product if y is None else y + product

    def stack(self, names: Sequence[str], groups: Groups) -> tuple[torch.Tensor, ...] | None:
        """Parameters of several adapters side by side, (adapters, …), for mixed batches without a graph.

        Args:
            names: The adapters, all on this layer.
            groups: What lays them side by side.

        Returns:
            What :meth:`apply_stack` takes. An adapter of zeros has to do nothing. ``None``: one adapter after the other is to be applied.
        """
        return None

    def apply_stack(self, stack: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        """The updates of several adapters, each of its own inputs. This form takes factors of low-rank products.

        Args:
            stack: What :meth:`stack` gave: inner factors, (adapters, n, in_features), and outer ones, (adapters, out_features, n).
            x: (adapters, vectors, in_features).

        Returns:
            (adapters, vectors, out_features).
        """
        inner, outer = stack
        return torch.bmm(torch.bmm(x, inner.mT), outer.mT)

    def moves_factors(self, stack: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether giving each row of a mixed batch a copy of its adapter moves less memory than sorting the rows by adapter.

        Args:
            stack: What :meth:`stack` gave.
            x: The layer's input, (rows, …, in_features).
            y: Its output.
        """
        return x.shape[0] * sum(t[0].numel() for t in stack) <= x.numel() + y.numel()

    def present(self, groups: Groups) -> list[str]:
        """Those adapters of a mixed batch that are on this layer."""
        return groups.once((self, "present"), lambda: [name for name in groups.names if self.has_adapter(name)])

    def stacked(self, groups: Groups) -> tuple[torch.Tensor, ...] | None:
        """What :meth:`stack` gives, for all groups of a mixed batch: zeros for adapters that are not here."""

        def stack() -> tuple[torch.Tensor, ...] | None:
            names = self.present(groups)
            found = self.stack(names, groups) if self.kind.is_matrix_product else None
            return None if found is None else tuple(groups.spread(t, names) for t in found)

        return groups.once(self, stack)

    def after_groups(self, groups: Groups, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        stacked = self.stacked(groups)
        if stacked is None:
            return None
        x = self.cast_input(x, stacked[0].dtype)
        if x.dim() > 2 and self.moves_factors(stacked, x, y):
            own = tuple(t.index_select(0, groups.number) for t in stacked)
            update = self.apply_stack(own, x.flatten(1, -2)).view(y.shape)
        else:
            update = groups.join(self.apply_stack(stacked, groups.split(x)), y.shape)
        return update.add_(y) if torch.promote_types(update.dtype, y.dtype) == update.dtype else y + update

    # -- scaling at run time ---------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to ``scale`` times what its configuration says; absent adapters are passed over."""
        if adapter in self.scaling:
            self.rescale(adapter, scale * self._configured_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of all active adapters."""
        if scale != 1:
            for name in self.active_adapters:
                if name in self.scaling:
                    self._configured_scaling(name)
                    self.rescale(name, float(self.scaling[name]) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of all active adapters, or set it back to what the configuration says."""
        for name in self.active_adapters:
            if name in self.scaling:
                configured = self._configured_scaling(name)
                self.rescale(name, configured if scale is None else float(self.scaling[name]) / scale)

    def rescale(self, name: str, scaling: float) -> None:
        """Set an adapter's scaling; where it is kept as a tensor, in place."""
        if isinstance(self.scaling[name], torch.Tensor):
            self.scaling[name].fill_(scaling)
        else:
            self.scaling[name] = scaling

    def _configured_scaling(self, name: str) -> float:
        return self._start_scaling.setdefault(name, float(self.scaling[name]))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._start_scaling.pop(adapter_name, None)


class DroppingLayer(ScaledLayer):
    """A layer whose adapters drop output features of their update, or all of it, at random in training."""

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.alpha: dict[str, float] = {}
        self.rank_dropout: dict[str, float] = {}
        self.rank_dropout_scale: dict[str, bool] = {}
        self.module_dropout: dict[str, float] = {}

    def settings(self, config: Any, target: str) -> dict[str, Any]:
        r, alpha = self.rank_and_alpha(config, target, config.alpha)
        return {
            "r": r,
            "alpha": alpha,
            "scaling": alpha / r,
            "rank_dropout": config.rank_dropout,
            "rank_dropout_scale": getattr(config, "rank_dropout_scale", True),
            "module_dropout": config.module_dropout,
        }

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """``y + ΔW x`` without dropout, or ``ΔW x`` where ``y`` is ``None``. This form goes through ΔW.

        Args:
            name: The adapter.
            x: The layer's input.
            y: Its output so far.
        """
        delta = self.delta(name, None)
        product = self.kind.product(self.get_base_layer(), self.cast_input(x, delta.dtype), delta)
        return product if y is None else y + product

    def after(self, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()) -> torch.Tensor:
        kept = self.kept(name, y)
        if kept is None:
            return self.add(name, x, y)
        return y + self.add(name, x, None) * self.kind.channels(self.get_base_layer(), kept)

    def drops(self, name: str) -> bool:
        """Whether parts of an adapter's update are dropped now."""
        return self.training and bool(self.rank_dropout[name] or self.module_dropout[name])

    def kept(self, name: str, y: torch.Tensor) -> torch.Tensor | None:
        """A factor for each output feature, zero where it is dropped; ``None`` where nothing can be dropped."""
        if not self.drops(name):
            return None
        # A product rather than a branch: a branch on a random number would break the graph of a compiled model.
        return self._kept_features(name, y) * (torch.rand((), device=y.device) >= self.module_dropout[name]).to(y.dtype)

    def _kept_features(self, name: str, like: torch.Tensor) -> torch.Tensor:
        kept = (torch.rand(self.out_features, device=like.device) >= self.rank_dropout[name]).to(like.dtype)
        if self.rank_dropout_scale[name]:
            kept = kept / kept.mean().clamp_min(1 / self.out_features)  # zeros stay zeros where all are dropped
        return kept

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """ΔW of an adapter in the layout of the base layer's weight.

        Args:
            adapter_name: The adapter.
            apply_rank_dropout: Drop rows at random, in training mode, as the forward pass does.
        """
        delta = super().get_delta_weight(adapter_name)
        if not (apply_rank_dropout and self.training and self.rank_dropout[adapter_name]):
            return delta
        base = self.get_base_layer()
        rows = self.kind.to_matrix(base, delta) * self._kept_features(adapter_name, delta)[:, None]
        return self.kind.from_matrix(base, rows)


def of_one_size(factors: Sequence[torch.Tensor], dim: int) -> Sequence[torch.Tensor]:
    """Factors of several adapters, smaller ones filled up with zeros in one of their dimensions.

    Args:
        factors: Equal in all dimensions but one.
        dim: Which.
    """
    longest = max(f.shape[dim] for f in factors)
    if all(f.shape[dim] == longest for f in factors):
        return factors
    return [pad_to(f, [longest if d == dim else n for d, n in enumerate(f.shape)]) for f in factors]
